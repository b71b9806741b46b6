# PushT at 64x64 pixels, 8 M parameters, about two hours on two CPU cores.
import machine

out_dir = 'out/pusht_tiny'
dataset = 'data/pusht'
num_frames = 3  # leaves more clips for the same work than a longer window
frame_interval = 3  # 0.3 s between frames; an action is 3 x 2 numbers
normalize_action = True
pred_name = 'x'  # a patch of 8x8x3 pixels is wider than the model, so noise could not get through it
injection = 'adaln'  # listens soonest: results/injection_pusht_ablation.md
patch_size = 8
hidden_size = 160
depth = 11  # ends with a block in space
num_heads = 5
clean_history = 1.0  # every clip begins as rollouts do
timestep_mean = 2.0  # with the std, half of the other frames are nearly noise: there the action is asked for
timestep_std = 4.0
batch_size = 16
max_steps = 7000
muon = True  # half the steps for the same loss
learning_rate = 4e-3
warmup_steps = 200
gradient_clip_norm = 1.0
ema_decay = 0.998  # averages the last 500 steps
dtype = machine.fast_dtype()  # bf16 is 1.8 times as fast on a CPU that has instructions for it
val_every = 500
latest_every = 250
keep_every = 1000
sample_steps = 1  # what follows an action is certain here
