# The reference's checkpoint of DINO-WM PushT, 100k steps: what its file does not say. For sample.py and evaluate.py.
ckpt = 'knightnemo/nanowm-b2-dino-wm-pusht-100k'
dataset = 'data/dino_pusht'
pred_name = 'v'
frame_interval = 5
context_frames = 1
normalize_action = True
num_steps = 250
