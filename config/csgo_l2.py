# CSGO with NanoWM-L/2: 50k steps on 8 GPUs (--max_steps=100000 is the longer run).
from config.rt1_b2 import *

out_dir = 'out/csgo_l2'
dataset = 'data/csgo'
num_frames = 16
context_frames = 4
action_dim = 51  # 11 keys, 2 clicks, 23 + 15 bins of mouse movement, one-hot
normalize_action = False
model_size = 'L'
batch_size = 6
learning_rate = 1e-5
metrics = 'lpips,fid,fvd'  # 12 frames are enough for FVD
sample_steps = 50  # a rollout has 12 frames to dream
