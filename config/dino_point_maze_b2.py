# DINO-WM Point Maze with NanoWM-B/2: 30k steps on 2 GPUs.
import os

from config.rt1_b2 import *

_results = os.environ.get('RESULTS_DIR', '')
out_dir = os.path.join(_results, 'out/dino_point_maze_b2')
dataset = os.path.join(_results, 'data/dino_point_maze')
frame_interval = 5
action_dim = 2
normalize_action = True
max_steps = 30_000
