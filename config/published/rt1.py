# The reference's checkpoint of RT-1, 300k steps: what its file does not say. For sample.py and evaluate.py.
ckpt = 'knightnemo/nanowm-b2-rt1-300k'
dataset = 'data/rt1'
pred_name = 'v'
frame_interval = 1
context_frames = 1
normalize_action = True
num_steps = 250
