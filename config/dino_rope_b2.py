# DINO-WM Rope with NanoWM-B/2: 15k steps on 2 GPUs.
import os

from config.rt1_b2 import *

_results = os.environ.get('RESULTS_DIR', '')
out_dir = os.path.join(_results, 'out/dino_rope_b2')
dataset = os.path.join(_results, 'data/dino_rope')
frame_interval = 1
action_dim = 4
normalize_action = False
max_steps = 15_000
