# The wall world for ablate.py at 8x8 pixels: minutes on one CPU core an arm, and a patch of 48 numbers passes through
# the 128 of the model, whatever it predicts. The data: python data.py wall --out=data/wall8 --image_size=8
dataset = 'data/wall8'
normalize_action = True
pred_name = 'v'  # with additive, the reference arm that the axes share
patch_size = 4
hidden_size = 128
depth = 4
num_heads = 4
timestep_mean = 0.5  # with the std: a fifth of the frames almost clean, three tenths noise, as in wall.py
timestep_std = 4.0
batch_size = 32
max_steps = 2500
learning_rate = 2.5e-3
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995
val_every = 1000
latest_every = 500
metrics_every = 1000
sample_steps = 20  # one number for all targets; --axis=steps says what others would give
