# stable-worldmodel's TwoRoom at 64x64 pixels, for its judge: 2.1 M parameters, and the wall's recipe but for the noise.
from config.wall import *

out_dir = 'out/two_room'
dataset = 'data/two_room'
frame_interval = 5  # as the judge's planner groups actions
patch_size = 16  # of 16x16x3 pixels, six times as wide as the model: x it must be
injection = 'adaln_fuse'  # learns to listen soonest
num_frames = 6  # a start and a plan of five: the window need not slide
timestep_mean = 1.0
timestep_std = 3.0
batch_size = 16
max_steps = 1200
val_every = 250
latest_every = 250
