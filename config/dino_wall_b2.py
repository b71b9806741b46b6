# DINO-WM Wall with NanoWM-B/2: 15k steps on 2 GPUs.
from config.rt1_b2 import *

out_dir = 'out/dino_wall_b2'
dataset = 'data/dino_wall'
frame_interval = 5
action_dim = 2
normalize_action = False
max_steps = 15_000
