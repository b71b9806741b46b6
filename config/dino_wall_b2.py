# DINO-WM Wall with NanoWM-B/2: 15k steps on 2 GPUs.
import os

from config.rt1_b2 import *

_results = os.environ.get('RESULTS_DIR', '')
out_dir = os.path.join(_results, 'out/dino_wall_b2')
dataset = os.path.join(_results, 'data/dino_wall')
frame_interval = 5
action_dim = 2
normalize_action = False
max_steps = 15_000
