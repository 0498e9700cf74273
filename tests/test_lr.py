"Learning rates for another batch size."
import warnings
from functools import partial

import numpy as np, pytest, torch
from fastai.optimizer import Adam, Lamb, OptimWrapper, ranger, RMSProp, SGD
from torch import nn
from fastai_bs_finder.all import scale_lr
from helpers import make_learner

@pytest.mark.parametrize('adaptive,opt', [
    (True,Adam), (False,SGD), (True,partial(Adam, mom=.8)), (True,RMSProp), (True,ranger), (True,Lamb),
    (False,partial(OptimWrapper, opt=torch.optim.SGD)), (True,partial(OptimWrapper, opt=torch.optim.Adam)),
    (True,torch.optim.AdamW), (False,torch.optim.SGD)])
def test_rules(adaptive, opt):
    "By the optimizer, given as a function, as a class or as it is"
    for o in (opt, opt([nn.Parameter(torch.zeros(1))], lr=.1)):
        assert np.isclose(scale_lr(.1, 64, 128, opt=o), .1*(2**.5 if adaptive else 2))
        assert np.isclose(scale_lr(.1, 64, 128, noise_scale=64., opt=o), .1*(4/3)**(.5 if adaptive else 1))
    assert scale_lr(.1, 64, 128, rule='linear', opt=opt)==.2 and np.isclose(scale_lr(.1, 64, 128, rule='sqrt', opt=opt), .1*2**.5)

def test_forms_of_a_learning_rate():
    assert scale_lr(slice(1e-3), 64, 128, rule='linear')==slice(2e-3)
    assert scale_lr([1e-4,1e-3], 64, 128, rule='linear')==[2e-4,2e-3]
    assert scale_lr(.1, 128, 64, rule='linear')==.05

def test_large_jumps():
    with pytest.warns(UserWarning, match='grows 8.0 times.*`learn.fit_one_cycle`'): scale_lr(.1, 64, 512, rule='linear')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        scale_lr(.1, 64, 128, rule='linear'), scale_lr(.1, 512, 8, rule='linear')

@pytest.mark.parametrize('kwargs,match', [
    (dict(rule='cubic'), "one of 'auto', 'noise', 'linear', 'sqrt'"),
    (dict(rule='noise'), "needs the noise scale, got None"),
    (dict(rule='noise', noise_scale=-1), 'needs the noise scale'), (dict(bs_to=0), 'bs_to must be positive'),
    (dict(bs_from=-8), 'bs_from must be positive')])
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match): scale_lr(.1, **(dict(bs_from=64, bs_to=128) | kwargs))

def test_learning_rates_that_fastai_takes(tmp_path):
    "fastai can't train with a NumPy number: none comes out of the table or of scale_lr, and bs_find takes them"
    learn = make_learner(tmp_path)
    learn.bs_find(np.float64(1e-3), num_it=40, show_plot=False, suggest_funcs=None)
    lr = learn.recorder.bs_table().lr[128]
    assert type(lr) is float and type(scale_lr(np.float64(1e-3), 64, 128)) is float
    with learn.no_logging(): learn.fit(1, lr)
