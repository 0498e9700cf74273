"Learning rates for another batch size."
import copy, warnings
from collections import namedtuple
from functools import partial

import numpy as np, pytest, torch
from fastai.optimizer import Adam, Lamb, Larc, Optimizer, OptimWrapper, QHAdam, RAdam, ranger, RMSProp, SGD
from torch import nn, tensor
from fastai_bs_finder.all import scale_lr
from fastai_bs_finder.lr import is_adaptive
from helpers import make_learner, same

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

# --- is it adaptive? by what it does, not by what it is made of

class Fused(Optimizer):
    "Adam in one piece, without fastai's callbacks"
    def __init__(self, params, lr, **kwargs): super().__init__(params, [], lr=lr, **kwargs)
    def step(self, closure=None):
        for p,pg,state,hyper in self.all_params(with_grad=True):
            m,v = (state.get(k, torch.zeros_like(p)) for k in ('m','v'))
            m,v = .9*m+.1*p.grad, .99*v+.01*p.grad**2
            self.state[p] = dict(state, m=m, v=v)
            p.data.add_(m/(v.sqrt()+1e-8), alpha=-hyper['lr'])

class Sign(torch.optim.Optimizer):
    "Steps by the sign of the gradient, as Lion does"
    def __init__(self, params, lr=1e-3): super().__init__(params, dict(lr=lr))
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is not None: p.data.add_(p.grad.sign(), alpha=-g['lr'])

class Plain(Sign):
    "With betas, which mean momentum here"
    def __init__(self, params, lr=1e-3, betas=(.9,.99)): torch.optim.Optimizer.__init__(self, params, dict(lr=lr, betas=betas))
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                m = self.state[p]['m'] = g['betas'][0]*self.state[p].get('m', 0)+p.grad
                p.data.add_(m, alpha=-g['lr'])

class Early(Sign):
    "Makes its state when it is built, as some of PyTorch's do"
    def __init__(self, params, lr=1e-3):
        super().__init__(params, lr)
        for g in self.param_groups:
            for p in g['params']: self.state[p]['sum'] = torch.zeros_like(p)
    def step(self, closure=None):
        for g in self.param_groups:
            for p in g['params']:
                if p.grad is None: continue
                self.state[p]['sum'] += p.grad**2
                p.data.addcdiv_(p.grad, self.state[p]['sum'].sqrt(), value=-g['lr'])

class Around:
    "A wrapper that has an optimizer and is none"
    def __init__(self, opt): self.opt,self.slow = opt,None
    def __getattr__(self, k): return getattr(self.__dict__['opt'], k)
    def step(self): self.opt.step()
    def zero_grad(self): self.opt.zero_grad()

class Closed(torch.optim.Optimizer):
    "Can't be tried, since it wants a closure"
    def __init__(self, params, lr=1e-3): super().__init__(params, dict(lr=lr))
    def step(self, closure): return closure()

kinds = dict(
    fused=(Fused, True), early=(Early, True), wrapped_early=(partial(OptimWrapper, opt=Early), True), sign=(Sign, True), plain=(Plain, False), closed=(Closed, False), qhadam=(QHAdam, True),
    radam=(RAdam, True),
    larc=(partial(Larc, clip=False), True), around_sgd=(lambda p, lr: Around(torch.optim.SGD(p, lr, momentum=.9)), False),
    around_adam=(lambda p, lr: Around(torch.optim.Adam(p, lr)), True), muon=(getattr(torch.optim, 'Muon', Sign), True),
    adagrad=(torch.optim.Adagrad, True), rprop=(torch.optim.Rprop, True), asgd=(torch.optim.ASGD, False),
    wrapped_plain=(partial(OptimWrapper, opt=Plain), False), wrapped_sign=(partial(OptimWrapper, opt=Sign), True))

@pytest.mark.parametrize('nm', kinds)
def test_optimizers_are_judged_by_their_steps(nm):
    "Double all gradients: do the steps double? Also when it has trained with other gradients, which it does not forget"
    make,adaptive = kinds[nm]
    assert is_adaptive(make)==adaptive
    weight = nn.Parameter(torch.randn(4,4))
    opt = make([weight], lr=1e-3)
    if nm!='closed':
        for _ in range(5):
            weight.grad = 100*torch.randn(4,4)
            opt.step()
    before,state = weight.detach().clone(),copy.deepcopy(opt.state_dict()) if nm!='around' else None
    rng = torch.get_rng_state()
    assert is_adaptive(opt)==adaptive
    assert torch.equal(weight, before) and same(opt.state_dict(), state) and torch.equal(rng, torch.get_rng_state())

@pytest.mark.parametrize('nm', ['fused','plain','wrapped_sign','wrapped_plain'])
def test_the_table_goes_by_the_same(nm, tmp_path):
    make,adaptive = kinds[nm]
    learn = make_learner(tmp_path, opt_func=make if nm!='plain' else partial(OptimWrapper, opt=Plain))
    learn.bs_find(1e-3, num_it=40, show_plot=False, suggest_funcs=None)
    assert learn.recorder.adaptive==adaptive

@pytest.mark.parametrize('lr,match', [
    ([1e-3,1e-3], 'lr has 2 learning rates, and the optimizer has 1 groups'), ('1e-3', 'positive and finite'),
    ([], 'positive and finite'),
    (np.array([1e-3,-1]), 'positive and finite'), (slice(1e-3,None), 'positive and finite'),
    (namedtuple('SuggestedLRs', 'valley')(1e-3), 'got SuggestedLRs of valley: pass one of these, as `.valley`')])
def test_what_is_no_learning_rate(learn, lr, match):
    with pytest.raises(ValueError, match=match): learn.bs_find(lr, num_it=40, show_plot=False)

@pytest.mark.parametrize('lr', [
    np.float32(1e-3), tensor(1e-3), np.array(1e-3), np.array([1e-3]), tensor([1e-3]), [1e-3], slice(tensor(1e-3))])
def test_forms_that_a_search_takes(learn, lr):
    learn.bs_find(lr, num_it=40, show_plot=False, suggest_funcs=None)
    got = learn.recorder.bs_table().lr[64]
    assert np.isclose(got.stop if isinstance(got, slice) else got[0] if isinstance(got, list) else got, 1e-3)
