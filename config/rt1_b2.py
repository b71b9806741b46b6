# RT-1 with NanoWM-B/2: the reference arm of the ablations (v, additive, 50k steps), on 8 GPUs:
#   torchrun --nproc_per_node=8 train.py config/rt1_b2.py
import os

_results = os.environ.get('RESULTS_DIR', '')
out_dir = os.path.join(_results, 'out/rt1_b2')
dataset = os.path.join(_results, 'data/rt1')
frame_shape = (4, 32, 32)
action_dim = 7  # the end effector's x, y, z, roll, pitch, yaw, and the gripper
normalize_action = True
model_size = 'B'
patch_size = 2
batch_size = 8  # on each of 8 GPUs
max_steps = 50_000
learning_rate = 1e-4
warmup_steps = 1000
gradient_clip_norm = 0.1
gradient_clip_start = 20_000
compile = True
num_val_clips = 256
metrics_every = 5000
sample_steps = 250
