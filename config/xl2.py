# Size XL with patches of 2 (NanoWM-XL/2), to be added after another config like s2.py.
from config.s2 import *

model_size = 'XL'
