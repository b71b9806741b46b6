# The wall world for ablate.py, so that each target learns to listen: patches of 12 numbers, uniform timesteps and the
# injection that is heard soonest. Seven minutes on one CPU core an arm.
# The data: python data.py wall --out=data/wall8 --image_size=8
dataset = 'data/wall8'
normalize_action = True
pred_name = 'v'
injection = 'adaln_fuse'
patch_size = 2
hidden_size = 64
depth = 4
num_heads = 2
timestep_sampling = 'uniform'  # flow has no loss weight: the noise of almost clean frames, unknowable, would fill it
batch_size = 32
max_steps = 6000
learning_rate = 4e-3
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995
val_every = 2000
latest_every = 500
metrics_every = 2000
sample_steps = 20  # one number for all targets; --axis=steps says what others would give
