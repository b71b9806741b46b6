# DINO-WM Point Maze with NanoWM-B/2: 30k steps on 2 GPUs.
from config.rt1_b2 import *

out_dir = 'out/dino_point_maze_b2'
dataset = 'data/dino_point_maze'
frame_interval = 5
action_dim = 2
normalize_action = True
max_steps = 30_000
