"""What a search costs: time and peak memory of `bs_find` against plain training over the same number of batches.

xresnet18 (11 million parameters) on random 32x32 images, batch size 32. Every method runs in a process of its own, in turn,
`--rounds` times; time is the median over rounds of the ratio to plain training of the same round, memory the median of the
peak resident size beyond plain training's."""
import json, resource, statistics, subprocess, sys, time
from common import *

methods = 'plain','accumulate','sequential','stack'

def learner(bs=32):
    from fastai.vision.models.xresnet import xresnet18
    set_seed(0)
    return image_learner(torch.randn(640,3,32,32), torch.randint(0,10,(640,)), xresnet18(n_out=10), bs=bs)

def one(method, batches, n_batch):
    "Seconds, peak memory and bytes of the saved copy, for one run of `method` in this process"
    learn = learner()
    n_epoch = math.ceil(batches/len(learn.dls.train))
    learn.remove_cb(ProgressCallback)
    x,y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward() # warm up the kernels
    learn.model.zero_grad()
    start = time.perf_counter()
    with learn.no_logging():
        if method=='plain':   learn.fit(n_epoch, 1e-3, cbs=StopAfter(batches))
        elif method=='stack': learn.fit(n_epoch, 1e-3, cbs=StackFinder(batches, n_batch))
        else: learn.bs_find(1e-3, num_it=batches, n_batch=n_batch, method=method, show_plot=False)
    seconds = time.perf_counter()-start
    state = sum(o.numel()*o.element_size() for o in (*learn.model.parameters(), *learn.model.buffers()))
    print(json.dumps(dict(seconds=seconds, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024, state=state)))

def main():
    p = parser(__doc__, batches=100, n_batch=20, rounds=5)
    p.add_argument('--one', choices=methods, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: return one(args.one, args.batches, args.n_batch)
    runs = {m:[] for m in methods}
    for r in range(args.rounds):
        for m in methods:
            out = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', m, '--batches', str(args.batches), '--n_batch', str(args.n_batch)],
                                 check=True, capture_output=True, text=True).stdout
            runs[m].append(json.loads(out.splitlines()[-1]))
    med = statistics.median
    plain,mb = runs['plain'],1e6
    print(f"xresnet18, batch 32, {args.batches} batches, n_batch {args.n_batch}: median of {args.rounds} rounds; plain training takes {1000*med(o['seconds'] for o in plain)/args.batches:.0f} ms a batch")
    table([{'method':m, 'time / plain':med(o['seconds']/p['seconds'] for o,p in zip(runs[m],plain)),
            'extra peak memory (MB)': f"{med(o['peak']-p['peak'] for o,p in zip(runs[m],plain))/mb:,.0f}",
            'saved state, included (MB)': f"{runs[m][0]['state']/mb:,.0f}" if m in estimators else '0'} for m in methods])

if __name__=='__main__': main()
