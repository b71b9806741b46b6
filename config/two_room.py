# stable-worldmodel's TwoRoom at 64x64 pixels, for its judge: 2.1 M parameters.
import machine

out_dir = 'out/two_room'
dataset = 'data/two_room'
frame_interval = 5  # as the judge's planner groups actions
normalize_action = True
pred_name = 'x'  # a patch of 16x16x3 pixels is six times as wide as the model
patch_size = 16
hidden_size = 128
depth = 5  # ends with a block in space
num_heads = 4
injection = 'adaln_fuse'  # learns to listen soonest
num_frames = 6  # a start and a plan of five: the window need not slide
clean_history = 1.0  # every clip begins as rollouts do
snr_gamma = 0.0  # almost clean frames count in full: the agent, 0.6 % of the picture, is learned there first
timestep_mean = 1.0
timestep_std = 3.0
batch_size = 16
max_steps = 1200
muon = True
learning_rate = 5e-3
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995  # averages the last 200 steps
dtype = machine.fast_dtype()  # of the CPU's products
val_every = 250
latest_every = 250
sample_steps = 1  # x needs few, and fewer are closer to the mean of what may happen
