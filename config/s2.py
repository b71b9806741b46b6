# Size S with patches of 2 (NanoWM-S/2): add it after another config, as in
#   python train.py config/wall.py config/s2.py --out_dir=out/wall_s2
model_size = 'S'
patch_size = 2
learning_rate = 1e-4
warmup_steps = 1000
