# PushT at 64x64 pixels, 5.2 M parameters, about an hour on two CPU cores.
import machine

out_dir = 'out/pusht_tiny'
dataset = 'data/pusht'
frame_interval = 5  # half a second between frames; an action is 5 x 2 numbers
normalize_action = True
pred_name = 'x'  # a patch of 8x8x3 pixels is as wide as the model, so noise would hardly get through it
patch_size = 8
hidden_size = 192
depth = 6
num_heads = 6
timestep_mean = 0.5  # with the std: a fifth of the frames almost clean, three tenths noise. The idea: after a clean
timestep_std = 4.0  # past only pure noise asks for the action; under less of it the block's place shows through
batch_size = 16
max_steps = 5500
learning_rate = 1.5e-3  # small models bear more than the default
warmup_steps = 200
gradient_clip_norm = 1.0
ema_decay = 0.998  # averages the last 500 steps
dtype = machine.fast_dtype()  # bf16 is 1.8 times as fast on a CPU that has instructions for it
val_every = 500
latest_every = 250
keep_every = 1000
sample_steps = 2  # x needs few, and fewer are closer to the mean of what may happen
