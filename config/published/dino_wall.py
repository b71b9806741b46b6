# The reference's checkpoint of DINO-WM Wall, 15k steps: what its file does not say. For evaluate.py,
# and for sample.py with --num_frames=10, as the episodes are short.
ckpt = 'knightnemo/nanowm-b2-dino-wm-wall-15k'
dataset = 'data/dino_wall'
pred_name = 'v'
frame_interval = 5
context_frames = 1
normalize_action = False
num_steps = 250
