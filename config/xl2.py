# Size XL with patches of 2 (NanoWM-XL/2): add it after another config, as in
#   python train.py config/wall.py config/xl2.py --out_dir=out/wall_xl2
model_size = 'XL'
patch_size = 2
learning_rate = 1e-4
warmup_steps = 1000
