"Losses of every kind: means and sums, weights, mixed examples."
from functools import partial

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import (
    CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, MSELossFlat)
from torch import nn, Tensor, tensor
from torch.nn import functional as F
from helpers import digits, plain_learner, search
from measuring import (
    assert_close, assert_far, by_batches, drowned_is_fine, each_method, enough, exact, learner, measure, pieces, stats)

pytestmark = drowned_is_fine

def sum_loss(p, y): return F.cross_entropy(p, y, reduction='sum')

class SumLoss(nn.Module):
    "A loss that keeps its reduction to itself"
    def forward(self, p, y): return F.cross_entropy(p, y, reduction='none').sum()

sums = dict(
    function=lambda: sum_loss, partial=lambda: partial(F.cross_entropy, reduction='sum'), module=SumLoss,
    torch=lambda: nn.CrossEntropyLoss(reduction='sum'), fastai=lambda: CrossEntropyLossFlat(reduction='sum'))

@pytest.mark.parametrize('n', [128,123], ids=['whole','partial'])
@pytest.mark.parametrize('nm', sums)
@each_method
def test_sum_over_the_batch(nm, n, method):
    "A loss that is summed has the noise, the scale and the noise scale of the mean, also where the last batch is smaller"
    kwargs = dict(items=digits()[:n], drop_last=False)
    mean,sum_ = learner(**kwargs),learner(loss=sums[nm](), **kwargs)
    columns = ['noise','scale','noise_scale']
    pd.testing.assert_frame_equal(stats(mean, method)[columns], stats(sum_, method)[columns], rtol=1e-3)

@pytest.mark.slow
@each_method
def test_noise_and_scale_of_a_sum(method):
    "Both are of the single examples' gradients, which are the same in a sum and in a mean"
    learn = learner(loss=sum_loss, items=digits()[:123], drop_last=False)
    assert_close(measure(learn, method, num_it=640), exact(learn))

@pytest.mark.slow
@each_method
def test_weighted_loss(method):
    "By classes that count more than others; each batch divides by its own sum of weights"
    w = torch.linspace(.5, 2, 10)
    # in micro-batches of 4 those sums differ so much that the scale comes out too small
    learn = learner(loss=CrossEntropyLossFlat(weight=w), bs=64 if method=='split' else 16)
    want = exact(learn, w[tensor([int(y) for _,y in digits()[:128]])].double())
    assert_far(want, exact(learn), .1)
    assert_close(measure(learn, method, n_batch=4, num_it=enough(method, 480)), want)

others = [LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat, FocalLossFlat, partial(LabelSmoothingCrossEntropy, .3)]

@pytest.mark.slow
@pytest.mark.parametrize('loss', others, ids=['smooth','smooth flat','focal','smoother'])
@each_method
def test_other_losses(loss, method):
    learn = learner(loss=loss())
    want = exact(learn)
    assert_far(want, exact(learner()), .05)
    assert_close(measure(learn, method), want)

@pytest.mark.slow
@each_method
def test_regression(method):
    def model(): return nn.Sequential(nn.Flatten(), nn.Linear(64,1))
    learn = learner(model, MSELossFlat(), [(x,y.float()) for x,y in digits()[:128]])
    assert_close(measure(learn, method, num_it=enough(method, 640)), exact(learn))

much_mixed = partial(MixUp, 5.)
mixed = [(much_mixed, CrossEntropyLossFlat, 'accumulate'), (much_mixed, CrossEntropyLossFlat, 'split'),
         (CutMix, LabelSmoothingCrossEntropyFlat, 'accumulate')]

@pytest.mark.slow
@pytest.mark.parametrize('mix,loss,method', mixed, ids=['MixUp','MixUp, split','CutMix'])
def test_mixed_examples(mix, loss, method):
    "Examples that are mixed with each other anew in each batch have the noise that a training with them has"
    bs = 8//pieces.get(method, 1) # examples are mixed within what goes through the model at once
    want = by_batches(learner(loss=loss(), cbs=mix(), bs=bs))
    assert_close(measure(learner(loss=loss(), cbs=mix()), method, num_it=enough(method, 480)), want)
    assert_far(want, exact(learner(loss=loss())), .05)

@pytest.mark.parametrize('mix', [MixUp, CutMix], ids=lambda o: o.__name__)
@each_method
def test_mixed_examples_with_a_sum(mix, method):
    "The loss of these callbacks is their own; it sums where the learner's sums"
    def make(reduction):
        loss = CrossEntropyLossFlat(reduction=reduction)
        return learner(loss=loss, cbs=mix(), items=digits()[:120], bs=16, drop_last=False)
    want,learn = stats(make('mean'), method).noise_scale,make('sum')
    pd.testing.assert_series_equal(stats(learn, method).noise_scale, want, rtol=1e-3)
    assert learn.loss_func.reduction=='sum'

def test_loss_of_a_mean_and_a_sum():
    "Neither the one nor the other: said, and measured as what it is nearer to"
    learn = plain_learner(loss=lambda p,y: F.cross_entropy(p, y) + .01*F.cross_entropy(p, y, reduction='sum'))
    with pytest.warns(UserWarning, match='duplicating a batch multiplies the gradient of its loss by 1.39'): search(learn)

def test_sum_of_single_losses():
    "A loss that says 'none' of a part of itself and adds up: what it does counts, not what it says"
    class Total(nn.CrossEntropyLoss):
        def __init__(self): super().__init__(reduction='none')
        def forward(self, p, y): return super().forward(p, y.as_subclass(Tensor)).sum()
    a,b = plain_learner(loss=Total()),plain_learner()
    search(a, lr=1e-12), search(b, lr=1e-12)
    assert np.allclose(a.recorder.noise, b.recorder.noise, rtol=1e-3)
