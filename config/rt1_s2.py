# RT-1 with NanoWM-S/2: the scale ablation, 50k steps on 8 GPUs.
from config.rt1_b2 import *

out_dir = 'out/rt1_s2'
model_size = 'S'
