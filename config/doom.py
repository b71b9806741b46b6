# Doom's take_cover at 64x64 pixels, 5 M parameters, the recipe of config/wall.py. Not yet tuned on Doom.
import machine

out_dir = 'out/doom'
dataset = 'data/doom'
frame_interval = 2  # 8 tics, about a quarter of a second: a fireball takes five such frames to arrive
pred_name = 'x'  # a patch of 8x8x3 pixels is wider than the model, so noise could not get through it
patch_size = 8
hidden_size = 160
depth = 11  # ends with a block in space
num_heads = 5
clean_history = 1.0  # every clip begins as rollouts do
timestep_mean = 1.0  # less than the wall's: fireballs are drawn from the middle levels, or they are a blur
timestep_std = 3.0
batch_size = 16
max_steps = 6000
muon = True
learning_rate = 4e-3
warmup_steps = 200
gradient_clip_norm = 1.0
ema_decay = 0.998  # averages the last 500 steps
dtype = machine.fast_dtype()  # of the CPU's products
val_every = 500
latest_every = 250
keep_every = 1000
sample_steps = 4  # what the imps do is not certain: here samples are right, not means
