# The reference's checkpoint of CSGO, 50k steps: what its file does not say. For sample.py and evaluate.py.
# (--ckpt=knightnemo/nanowm-l2-csgo-100k is the longer run.)
ckpt = 'knightnemo/nanowm-l2-csgo-50k'
dataset = 'data/csgo'
pred_name = 'v'
frame_interval = 1
context_frames = 4
normalize_action = False
num_steps = 50
schedule = 'full_sequence'  # as the reference measures it
