# The reference's checkpoint of DINO-WM Point Maze, 30k steps: what its file does not say. For sample.py, evaluate.py.
ckpt = 'knightnemo/nanowm-b2-dino-wm-point-maze-30k'
dataset = 'data/dino_point_maze'
pred_name = 'v'
frame_interval = 5
context_frames = 1
normalize_action = True
num_steps = 250
