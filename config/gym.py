# A Gymnasium world at 64x64 pixels, 2.5 M parameters, minutes on two CPU cores; say which:
#     python train.py config/gym.py --dataset=data/carracing --out_dir=out/carracing
from config.wall import *

dataset = 'data/gym'
out_dir = 'out/gym'
normalize_action = True  # what one environment calls 1 another calls 1000
batch_size = 16
sample_steps = 2
