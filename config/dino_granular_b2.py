# DINO-WM Granular with NanoWM-B/2: 15k steps on 2 GPUs.
from config.rt1_b2 import *

out_dir = 'out/dino_granular_b2'
dataset = 'data/dino_granular'
frame_interval = 1
action_dim = 4
normalize_action = False
max_steps = 15_000
