# The wall world on a laptop: 32x32 pixels, 2.5 M parameters, minutes on two CPU cores (results/speedrun.md).
import machine

out_dir = 'out/wall'
dataset = 'data/wall'
normalize_action = True  # an action is less than a tenth of the room: too small an input otherwise
pred_name = 'x'  # a patch of 8x8x3 pixels is wider than the model, so noise could not get through it
injection = 'adaln'  # a decibel more than additive after 1,200 steps
patch_size = 8
hidden_size = 128
depth = 5  # ends with a block in space
num_heads = 4
snr_gamma = 0.0  # the min-SNR weight hides almost clean frames, where detail is learned: with it a decibel less
clean_history = 1.0  # every clip begins as rollouts do
timestep_mean = 2.0  # with the std, half of the other frames have t > 880: only the action tells them
timestep_std = 4.0
batch_size = 24
max_steps = 2400
muon = True  # half the steps for the same loss
learning_rate = 5e-3  # small models bear more than the default
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995  # averages the last 200 steps
dtype = machine.fast_dtype()  # bf16 where the hardware multiplies in it
val_every = 500
latest_every = 500
sample_steps = 1  # x needs few, and what follows an action is certain here
