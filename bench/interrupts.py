"""Ctrl-C twice at random moments of a search, on a model of nine million parameters that has trained with Adam.

Each time the weights, the optimizer's state, the random states and the learner's attributes are compared bit for bit with
those before. The first signal comes at a random moment of the first second of `bs_find`, half of them in its first tenth,
where the state is saved; the second comes up to 100 ms later, often while the state is put back.
`python bench/interrupts.py --n 200` prints how often all of it was as before."""
import random, signal, threading
from common import *
from fastai.callback.progress import ProgressCallback

def big_learner():
    "Nine million parameters, and moments for each of them"
    set_seed(0)
    x,y = torch.randn(512, 256),torch.randint(0, 10, (512,))
    ds = list(zip(x, y))
    dls = DataLoaders.from_dsets(ds, ds[:64], bs=32, num_workers=0, shuffle=True, drop_last=True, device='cpu')
    model = nn.Sequential(nn.Linear(256,2048), nn.ReLU(), nn.Linear(2048,4096), nn.ReLU(), nn.Linear(4096,10))
    learn = Learner(dls, model, CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, 1e-4)
    return learn

def facts(learn):
    "All that a training depends on, as tensors and plain values"
    state = [v for pl in learn.opt.param_lists for p in pl for v in learn.opt.state[p].values()]
    tensors = [*learn.model.state_dict().values(), *(o for o in state if isinstance(o, Tensor)), torch.get_rng_state()]
    plain = [[o for o in state if not isinstance(o, Tensor)], [dict(o) for o in learn.opt.hypers], random.getstate(),
             np.random.get_state()[1].tolist(), learn.dls.train.rng.getstate(), learn.dls.train.bs, [id(o) for o in learn.cbs],
             {k: id(v) for k,v in vars(learn).items() if k!='recorder'}, [o.training for o in learn.model.modules()],
             [len(p._backward_hooks or ()) for p in learn.model.parameters()], torch.is_grad_enabled(),
             signal.getsignal(signal.SIGINT)]
    return [o.clone() for o in tensors],plain

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a[0], b[0])) and a[1]==b[1]

def send(wait, gap):
    time.sleep(wait), os.kill(os.getpid(), signal.SIGINT)
    time.sleep(gap), os.kill(os.getpid(), signal.SIGINT)
    time.sleep(.05) # until it has come

def search(learn): learn.bs_find(1e-4, num_it=300, show_plot=False, suggest_funcs=None)

def handler(signum, frame):
    "As Python's own, but only inside of `search`: that would also end this program, between two of its lines"
    while frame is not None:
        if frame.f_code is search.__code__: raise KeyboardInterrupt
        frame = frame.f_back

def interrupted(learn, wait, gap):
    "Search until the signals come; what was going on when they came through"
    thread = threading.Thread(target=send, args=(wait, gap))
    names = []
    try:
        thread.start()
        search(learn)
    except KeyboardInterrupt as e:
        tb = e.__traceback__
        while tb: names,tb = [*names, tb.tb_frame.f_code.co_name],tb.tb_next
    thread.join()
    return 'saving' if '__enter__' in names else 'restoring' if '__exit__' in names else 'training' if names else 'none'

if __name__=='__main__':
    args = parser(__doc__, n=200).parse_args()
    learn,rng,rows = big_learner(),random.Random(0),{}
    signal.signal(signal.SIGINT, handler)
    print(f'{sum(p.numel() for p in learn.model.parameters()):,} parameters')
    before = facts(learn)
    for _ in range(args.n):
        where = interrupted(learn, rng.uniform(0, rng.choice((.1, 1))), rng.uniform(0, .1))
        ok = same(before, facts(learn))
        row = rows.setdefault(where, dict(signal_while=where, times=0, as_before=0))
        row['times'] += 1
        row['as_before'] += ok
    table([*rows.values(), dict(signal_while='all', times=args.n, as_before=sum(o['as_before'] for o in rows.values()))])
