"""Batch size and learning rate for several processes, and a training with them. On two GPUs, or two cores of a CPU:

    torchrun --nproc-per-node 2 distributed.py
"""
import os
import torch
if not torch.cuda.is_available(): os.environ['ACCELERATE_USE_CPU'] = 'true' # or accelerate looks for GPUs

from fastai.basics import *
from fastai.distributed import *
from fastai_bs_finder.all import *
from fastai_bs_finder.digits import digits_learner

learn = digits_learner(metrics=accuracy)
learn.dls = learn.dls.shared() # needed without a GPU only

with learn.distrib_ctx(sync_bn=torch.cuda.is_available()):
    sugg = learn.bs_find(epochs=5, seconds=30, show_plot=False)
    if rank_distrib()==0: print(f'{sugg}\n{learn.recorder.bs_find_summary()}', flush=True)
    learn.dls = learn.dls.with_bs(sugg.per_process)
    learn.fit_one_cycle(sugg.epochs, sugg.lr)
