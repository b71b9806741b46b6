# DINO-WM PushT with NanoWM-B/2: 100k steps on 8 GPUs (--max_steps=30000 is the injection ablation).
from config.rt1_b2 import *

out_dir = 'out/dino_pusht_b2'
dataset = 'data/dino_pusht'
frame_interval = 5
action_dim = 2  # relative, a hundredth of the pixels moved
normalize_action = True
max_steps = 100_000
