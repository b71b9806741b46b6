# PushT for ablate.py at 8x8 pixels: config/wall_ablation_long.py's model, so that each target learns to listen.
# Five minutes on one CPU core an arm. The data: python data.py pusht --out=data/pusht8 --image_size=8 --episodes=700
dataset = 'data/pusht8'
frame_interval = 10  # a second between frames, so that an action moves something; it is 10 x 2 numbers
normalize_action = True
pred_name = 'v'
injection = 'adaln_fuse'
patch_size = 2
hidden_size = 64
depth = 4
num_heads = 2
timestep_sampling = 'uniform'
batch_size = 32
max_steps = 4000
learning_rate = 4e-3
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995
val_every = 2000
latest_every = 500
metrics_every = 2000
sample_steps = 20
