"""Is the number right while the weights move? Each method along its own mock training, against the exact values along
that training.

Along the training `noise` and `scale` are computed from the gradient of each of `--items` training items, drawn anew
each time (`torch.func`): for `accumulate` at each optimizer step, for normal training at every batch on MNIST, where
`scale` jumps from batch to batch, and at every 5th on the others. Both series are then smoothed as the recorded ones
are, over the same window of batches (`beta`), and divided; that is what the recorded noise scale is compared with,
every 10 batches after the first 100. Error: median over these points and over the seeds of |recorded/exact - 1|;
bias: the median of recorded/exact - 1. `split`, `per_example` and `sequential` step on every batch, so on the models
here, which have no batch norm, they share one trajectory, that of normal training, and its exact values. `accumulate`
steps once in `n_batch` batches.

Each finished run is kept in `results/tracking_*.csv` (recorded and exact series, not smoothed); `--fresh` computes
them again."""
import itertools
from curves import *
from fastai_bs_finder.finder import EndSearch

def adult_mlp(path):
    "`adult` without batch norm and dropout"
    dls = adult(path).dls
    return tabular_learner(dls, layers=[200,100], config=tabular_config(use_bn=False, bn_cont=False))

def small_republic(path):
    return republic(path, seq_len=32, n=32)

# learner, learning rate, batches, exact values of normal training at every so many of them
tasks = {'mnist': (mnist,.02,600,1), 'adult': (adult_mlp,1e-3,1000,5), 'republic': (small_republic,1e-3,600,5)}
methods = {
    **{f'accumulate, n_batch={n}': dict(method='accumulate', n_batch=n) for n in (5,10,20)},
    **{f'split, k={k}': dict(method='split', n_batch=5, k=k) for k in (2,4,8)},
    'per_example': dict(method='per_example', n_batch=5),
    'sequential, n_batch=10': dict(method='sequential', n_batch=10)}
betas = .98,.99,.995,.998,.9995

class Exact(Callback):
    "Exact `noise` and `scale` at every `every`th batch, from `n_items` items drawn anew"
    order = BSFinder.order-1
    def __init__(self, finder, n_items, every, seed):
        self.finder,self.n_items,self.every,self.gen,self.rows = finder,n_items,every,torch.Generator().manual_seed(seed),[]
    def before_fit(self): self.items = all_items(self.learn.dls.train)
    def before_batch(self):
        n = getattr(self.finder, 'n_seen', 0) # whole batches, however they are cut
        if n%self.every==0 and (not self.rows or self.rows[-1][0] < n):
            ids = torch.randperm(len(self.items[-1]), generator=self.gen)[:self.n_items]
            self.rows.append((
                n,
                *exact_noise_and_scale(self.model, self.learn.loss_func, [o[ids] for o in self.items], self.dls.n_inp)))

def all_items(dl):
    "Inputs and targets of the whole training set, as a batch"
    dl = dl.new(shuffle=False, drop_last=False, bs=1000)
    return [torch.cat([o.as_subclass(Tensor) for o in os]) for os in zip(*dl)]

def track(make, lr, batches, kw, seed, n_items, every):
    "Recorded series of one mock training, and exact ones if `every`"
    set_seed(seed)
    learn = make()
    finder = BSFinder(beta=1, **kw)
    ref = Exact(finder, n_items, every, seed)
    cbs = [finder, EndSearch(finder, batches)] + ([ref] if every else [])
    with learn.no_bar(), learn.no_logging(): learn.fit(math.ceil(batches/len(learn.dls.train)), lr, cbs=cbs)
    recorded = pd.DataFrame([r[:3] for r in finder.running.rows], columns=['n_iter','noise','scale']).assign(series='recorded')
    return pd.concat([
        recorded,
        pd.DataFrame(ref.rows, columns=['n_iter','noise','scale']).assign(series='exact')]) if every else recorded

def smoothed(df, beta, at):
    "`noise_scale` of a series, smoothed, at the batches `at`"
    res = []
    for n in at:
        old = df[df.n_iter <= n]
        w = beta**(n-old.n_iter)
        res.append(noise_scale(float((w*old.noise).sum()), float((w*old.scale).sum())))
    return np.array(res)

def ratios(done, method, seed, beta):
    "Recorded over exact, every 10 batches"
    df = done[done.seed==seed]
    rec = df[(df.method==method) & (df.series=='recorded')]
    exact = df[(df.method==(method if method.startswith('accumulate') else with_exact)) & (df.series=='exact')]
    at = [n for n in rec.n_iter if n > 100 and n%10==0]
    return smoothed(rec, beta, at)/smoothed(exact, beta, at)

with_exact = 'split, k=2' # the run that has the exact values of normal training

def main():
    p = parser(__doc__, data=True, seeds=1, items=5000)
    p.add_argument('--task', choices=tasks, help='only this one')
    p.add_argument('--fresh', action='store_true', help='compute finished runs again')
    args = p.parse_args()
    for task,(make,lr,batches,every) in tasks.items():
        if args.task not in (None,task): continue
        path = RESULTS/f'tracking_{task}.csv'
        done = pd.read_csv(path) if path.exists() and not args.fresh else pd.DataFrame(columns=[
            'method', 'seed', 'series', 'n_iter', 'noise', 'scale'])
        for seed,(nm,kw) in itertools.product(range(args.seeds), methods.items()):
            if ((done.method==nm) & (done.seed==seed)).any(): continue
            start = time.perf_counter()
            df = track(
                partial(make, args.data), lr, batches, kw, seed, args.items,
                every if nm==with_exact else kw['n_batch'] if kw['method']=='accumulate' else None).assign(method=nm, seed=seed)
            done = pd.concat([done, df]) if len(done) else df
            done.to_csv(path, index=False, float_format='%.6g')
            print(f'{task}, {nm}, seed {seed}: {time.perf_counter()-start:.0f} s', file=sys.stderr, flush=True)
        rows = []
        for nm in methods:
            r = {b: np.concatenate([ratios(done, nm, seed, b) for seed in range(args.seeds)]) for b in betas}
            rows.append({
                'method':nm,
                **{f'beta {b}': f'{100*np.median(abs(r[b]-1)):.1f}% ({100*np.median(r[b]-1):+.1f})' for b in betas}})
        exact = done[(done.method==with_exact) & (done.series=='exact') & (done.seed==0)]
        ends = exact.head(len(exact)//10), exact.tail(len(exact)//5)
        first,last = (noise_scale(o.noise.mean(), o.scale.mean()) for o in ends)
        print(f"{task}: median error (bias) along {batches} batches of {make(args.data).dls.bs}, {args.seeds} seeds; "
              f"normal training's exact noise scale goes from {first:.0f} to {last:.0f}\n")
        table(rows)

if __name__=='__main__': main()
