"Ctrl-C at any moment, once or twice: what `preserve` has begun to put back it finishes. These are real signals."
import os, random, signal, sys, threading, time
from collections import deque

import numpy as np, pytest, torch
from helpers import make_learner, same, search, weights
from fastai_bs_finder import state
from fastai_bs_finder.all import preserve

def everything(learn):
    "What a training depends on"
    opt = learn.opt and [{k: v for k,v in learn.opt.state[p].items()} for pl in learn.opt.param_lists for p in pl]
    return dict(
        weights=weights(learn), opt=opt, hypers=learn.opt and [dict(o) for o in learn.opt.hypers],
        attributes={k: id(v) for k,v in vars(learn).items() if k!='recorder'}, cbs=[id(o) for o in learn.cbs],
        chance=[random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()],
        loader=[learn.dls.train.bs, learn.dls.train.rng.getstate()],
        modes=[torch.is_grad_enabled(), torch.is_autocast_enabled('cpu'), [o.training for o in learn.model.modules()]],
        hooks=[len(p._backward_hooks or ()) for p in learn.model.parameters()], handler=signal.getsignal(signal.SIGINT))

@pytest.fixture(autouse=True)
def interrupts():
    "As a terminal has them: a shell may start what runs in the background with interrupts ignored"
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)

def trained(tmp_path):
    learn = make_learner(tmp_path)
    with learn.no_logging(): learn.fit(1, 1e-3)
    return learn

class Interrupt:
    "A signal to this very process at the `k`-th line that runs in one of `codes`; `n` counts the lines"
    def __init__(self, codes, k=None): self.codes,self.k,self.n = codes,k,0
    def __enter__(self): sys.settrace(self._call)
    def __exit__(self, *args): sys.settrace(None)
    def _call(self, frame, event, arg): return self._line if frame.f_code in self.codes else None
    def _line(self, frame, event, arg):
        if event=='line':
            self.n += 1
            if self.n==self.k: os.kill(os.getpid(), signal.SIGINT)
        return self._line

def codes_of(*objects):
    "The code of functions, of methods, and of the functions inside them"
    todo,res = list(objects),set()
    while todo:
        o = todo.pop()
        if isinstance(o, type): todo += [v for v in vars(o).values() if callable(v)]
        elif hasattr(o, '__code__'): todo.append(o.__code__)
        elif hasattr(o, 'co_consts'):
            res.add(o)
            todo += [c for c in o.co_consts if hasattr(c, 'co_consts')]
    return res

own = [v for v in vars(state).values() if getattr(v, '__module__', None)==state.__name__]

def lines_to_try(n, fast): return sorted({int(o) for o in np.linspace(1, n, min(n, fast))})

def interrupted(learn, call, codes, k):
    "Call with an interrupt at line `k`; did it come through?"
    try:
        with Interrupt(codes, k): call(learn)
    except KeyboardInterrupt: return True
    return False

def short(learn): return search(learn, num_it=4, n_batch=2)

def profiled(learn): return learn.bs_profile(bss=[8], limit=.05, show_plot=False)

@pytest.mark.parametrize('call', [short, profiled])
def test_interrupt_at_each_line_of_saving_and_restoring(tmp_path, call, request):
    "It comes through afterwards, and all is as it was. With `--every-line` these are all lines, or else some of them"
    learn,counter = trained(tmp_path),Interrupt(codes_of(*own))
    n = 10**9 if request.config.getoption('--every-line') else 60
    before = everything(learn)
    with counter: call(learn)
    lines = lines_to_try(counter.n, n)
    for k in lines:
        came = interrupted(learn, call, codes_of(*own), k)
        now = everything(learn)
        assert not (d := [o for o in before if not same(before[o], now[o])]), (k, d)
        assert came or k > counter.n-20 or call is profiled, k # a profile takes another number of lines each time
    assert len(lines) >= min(n, counter.n)*.9
    print(f'{call.__name__}: interrupted at {len(lines):,} of {counter.n:,} lines')

def test_the_state_is_put_back_where_one_thing_fails(tmp_path):
    "An object that can't be restored: the others are, and its error is told"
    learn = trained(tmp_path)
    before = everything(learn)
    class Stubborn(deque):
        def clear(self): raise RuntimeError('mine')
    learn.stubborn = Stubborn([1])
    with pytest.raises(RuntimeError, match='mine'):
        with preserve(learn): learn.model[0].weight.data.add_(1)
    del learn.stubborn
    now = everything(learn)
    assert not [k for k in before if not same(before[k], now[k])]

def twice(seconds, gap):
    "Two signals, the second one shortly after the first"
    def send():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(gap)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(.05) # until it has come
    return threading.Thread(target=send)

def test_two_interrupts_at_random_moments(tmp_path):
    "`bench/interrupts.py` does it 200 times on a model of nine million parameters"
    rng,learn,came = random.Random(0),trained(tmp_path),[]
    def handler(signum, frame): # Python's own would also hit the test itself
        while frame is not None:
            if frame.f_code is search.__code__: raise KeyboardInterrupt
            frame = frame.f_back
    old = signal.signal(signal.SIGINT, handler)
    before = everything(learn)
    try:
        for _ in range(8):
            thread = twice(rng.uniform(0, .1), rng.uniform(0, .01))
            try:
                thread.start()
                search(learn, num_it=500)
            except KeyboardInterrupt: came.append(1)
            thread.join()
            now = everything(learn)
            assert not (d := [o for o in before if not same(before[o], now[o])]), d
    finally: signal.signal(signal.SIGINT, old)
    assert len(came) >= 6 # some come before the search has begun

def test_a_handler_of_the_users_is_kept(tmp_path):
    "It is called, at the latest when all is put back, and stays"
    calls,learn = [],trained(tmp_path)
    def handler(signum, frame): calls.append(signum)
    old = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupt(codes_of(*own), 50): short(learn)
        assert signal.getsignal(signal.SIGINT) is handler
    finally: signal.signal(signal.SIGINT, old)
    assert calls==[signal.SIGINT]
