# RT-1 with NanoWM-B/2, the main run: 300k steps on 8 GPUs.
from config.rt1_b2 import *

out_dir = 'out/rt1_b2_300k'
max_steps = 300_000
