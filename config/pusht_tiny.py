# PushT at 64x64 pixels, 8 M parameters: two hours of one CPU core, with --compile=True. The recipe is the wall's.
from config.wall import *

out_dir = 'out/pusht_tiny'
dataset = 'data/pusht'
num_frames = 3  # leaves more clips for the same work than a longer window
frame_interval = 3  # 0.3 s between frames; an action is 3 x 2 numbers
hidden_size = 160
depth = 11  # ends with a block in space
num_heads = 5
batch_size = 16
max_steps = 7000
learning_rate = 4e-3
warmup_steps = 200
ema_decay = 0.998  # averages the last 500 steps
latest_every = 250
keep_every = 1000
