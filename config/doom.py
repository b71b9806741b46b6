# Doom's take_cover at 64x64 pixels: the model and recipe of PushT.
from config.pusht_tiny import *

out_dir = 'out/doom'
dataset = 'data/doom'
max_steps = 10000
context_frames = 2  # one frame does not say which way anything moves
frame_interval = 2  # 8 tics, about a quarter of a second: a fireball takes five such frames to arrive
normalize_action = False  # two buttons, 0 or 1
sample_steps = 4  # what the imps do is not certain: here samples are right, not means
