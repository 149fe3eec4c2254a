"""One thread for the tensors of tests, and of the programs they start: they are small, on a busy machine threads wait
for each other, and with another number of threads the last bit of a sum can differ.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; started programs inherit it

import torch

torch.set_num_threads(1)
