"What the benchmarks share: data, learners, exact values, the stack-and-concatenate baseline and a table printer."
import argparse, os, sys, time, warnings
from pathlib import Path
os.environ.setdefault('MPLBACKEND', 'Agg')

import numpy as np, pandas as pd, torch
from fastai.basics import *
from fastai.callback.all import *
from fastai_bs_finder.all import *
from fastai_bs_finder.stats import RunningNoiseScale, noise_and_scale, noise_scale

def parser(doc, **defaults):
    "Argument parser with one option per keyword, and `--data` where `data` is among them"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if defaults.pop('data', False):
        p.add_argument('--data', type=Path, required=True, help='folder with the data files')
    for k,v in defaults.items(): p.add_argument(f'--{k}', type=type(v), default=v, help='default: %(default)s')
    return p

def need(path):
    "`path`, or a clear end if it is not there"
    if not path.exists(): raise SystemExit(f"{path} not found: pass the folder that has it with --data")
    return path

def table(rows, index=None):
    "Print a list of dicts as a Markdown table"
    df = pd.DataFrame(rows)
    cols = list(df.columns)
    print('| ' + ' | '.join(cols) + ' |')
    print('|' + '---|'*len(cols))
    def shown(o): return str(o) if not isinstance(o, float) else f'{o:,.3g}' if abs(o) < 1000 else f'{o:,.0f}'
    for r in df.itertuples(index=False): print('| ' + ' | '.join(map(shown, r)) + ' |')
    print(flush=True)

def mnist_tensors(path, n=None, part='train'):
    "Normalised images and labels of MNIST's training set, or of its test set"
    d = np.load(need(path/'mnist.npz'))
    x,y = torch.tensor(d[f'x_{part}'][:n]), torch.tensor(d[f'y_{part}'][:n]).long()
    return x.float().div(255).sub(.1307).div(.3081)[:,None], y

def image_learner(x, y, model, bs=64, **kwargs):
    "Learner on tensors of images, without a word of validation"
    ds = list(zip(x, y))
    dls = DataLoaders.from_dsets(ds, ds[:bs], bs=bs, num_workers=0, shuffle=True, drop_last=True, device='cpu')
    return Learner(dls, model, CrossEntropyLossFlat(), **kwargs)

def spread(o, digits='.4g', digits_std='.2g'):
    "Mean and standard deviation"
    return f'{o.mean():{digits}} ± {o.std():{digits_std}}'

def small_convnet():
    "6,300 parameters, no batch norm: its per-example gradients can be computed exactly"
    return nn.Sequential(nn.Conv2d(1,8,5,stride=2,padding=2), nn.ReLU(), nn.Conv2d(8,16,3,stride=2,padding=1), nn.ReLU(),
        nn.Conv2d(16,16,3,stride=2,padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256,10))

def exact_noise_and_scale(model, loss_func, items, n_inp=1, chunk=250):
    "`noise` and `scale` of all `items` (tensors, the first `n_inp` are inputs), from each one's gradient, summed up in float64"
    from torch.func import functional_call, grad, vmap
    params = {k:v.detach() for k,v in model.named_parameters()}
    def loss(params, *b):
        return loss_func(functional_call(model, params, tuple(o[None] for o in b[:n_inp])), *(o[None] for o in b[n_inp:]))
    per_example = vmap(grad(loss), (None,*[0]*len(items)))
    total,squares = 0.,0.
    for b in zip(*(o.split(chunk) for o in items)):
        gs = [o.flatten(1) for o in per_example(params, *b).values()]
        total = total + torch.cat([o.sum(0, dtype=torch.float64) for o in gs])
        squares += sum(o.square().sum(dtype=torch.float64).item() for o in gs)
    n = len(items[0])
    mean_sq = (total/n).square().sum().item()
    noise = (squares/n - mean_sq)*n/(n-1)
    return noise, mean_sq - noise/n # what chance alone adds to the mean gradient of n items is not signal

class StopAfter(Callback):
    "End the fit after `num_it` batches, without validation"
    def __init__(self, num_it): self.num_it = num_it
    def after_batch(self):
        if self.train_iter >= self.num_it: raise CancelFitException()
    def before_validate(self): raise CancelValidException()

class StackFinder(StopAfter):
    "The baseline: keep the flat gradients of `n_batch` batches, stack them, take the mean (as both public fastai finders do)"
    order = MixedPrecision.order-4
    def __init__(self, num_it, n_batch=10, beta=.998):
        super().__init__(num_it)
        self.n_batch,self.beta = n_batch,beta
    def before_fit(self): self.stored,self.running = [],RunningNoiseScale(self.beta)
    def before_step(self):
        self.stored.append(torch.cat([p.grad.flatten().view(-1,1) for p in self.model.parameters() if p.grad is not None]))
        if len(self.stored) < self.n_batch:
            self.opt.zero_grad()
            raise CancelBatchException()
        grads = torch.cat(self.stored, dim=1)
        self.stored.clear()
        small,big,bs = (grads**2).sum(0).mean(), (grads.mean(1)**2).sum(), find_bs(self.yb)
        self.running.add(self.train_iter, *noise_and_scale(small.item(), big.item(), bs, bs*self.n_batch))
