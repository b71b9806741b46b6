# Size L with patches of 2 (NanoWM-L/2): add it after another config, as in
#   python train.py config/wall.py config/l2.py --out_dir=out/wall_l2
model_size = 'L'
patch_size = 2
learning_rate = 1e-4
warmup_steps = 1000
