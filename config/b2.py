# Size B with patches of 2 (NanoWM-B/2): add it after another config, as in
#   python train.py config/wall.py config/b2.py --out_dir=out/wall_b2
model_size = 'B'
patch_size = 2
learning_rate = 1e-4
warmup_steps = 1000
