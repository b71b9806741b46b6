# A Gymnasium world at 64x64 pixels, 2 M parameters, minutes on two CPU cores; say which:
#     python train.py config/gym.py --dataset=data/carracing --out_dir=out/carracing
import machine

dataset = 'data/gym'
out_dir = 'out/gym'
normalize_action = True  # what one environment calls 1 another calls 1000
pred_name = 'x'  # a patch of 8x8x3 pixels is wider than the model, so noise could not get through it
patch_size = 8
hidden_size = 128
depth = 5  # ends with a block in space
num_heads = 4
clean_history = 1.0  # every clip begins as rollouts do
timestep_mean = 2.0  # as for the wall
timestep_std = 4.0
batch_size = 16
max_steps = 3000
muon = True
learning_rate = 5e-3  # small models bear more than the default
warmup_steps = 100
gradient_clip_norm = 1.0
ema_decay = 0.995  # averages the last 200 steps
dtype = machine.fast_dtype()  # of the CPU's products
val_every = 500
latest_every = 500
sample_steps = 2
