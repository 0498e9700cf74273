"""One table of what there is: our methods, the stack-and-concatenate baseline and plain training.

Cost: time and peak memory over as many batches as plain training, of an xresnet18 (11 million parameters, random
32x32 images, batches of 32) and of a convnet of 5,000 parameters on MNIST (batches of 64), where overhead rules. Each
in a process of its own, in turn, `--rounds` times; time is the median of the ratio to plain training of the same
round, memory (xresnet18) the median of the peak resident size beyond plain training's.

Truth: at weights that stand still after a short training, `--runs` searches of 200 batches each (a quarter of them
for the methods that nobody needs an interval of), on the MNIST convnet and on an MLP on Adult, against the gradients
of all training items. Bias: the ratio of the mean `noise` to the mean `scale` over all searches, against the exact
noise scale. Spread: standard deviation of a single search's noise scale. Coverage: share of searches whose 95%
interval, that of the last measurement, holds the exact value. And how `tol=0.25` does.

Batch norm: the same at fixed weights for two models that have it, where no exact value exists: what `split` measures,
with micro-batches of a half to an eighth of a batch of 64, as a multiple of what `accumulate` measures with whole
batches. Means of 20 searches.

What was measured is kept in `results/compare_*.csv`, so that only methods which are new are measured; `--fresh`
measures all again. Let nothing else run while costs are measured."""
import json, resource, subprocess
from tracking import *

methods = {
    'plain training': None, 'accumulate': dict(method='accumulate'), 'split, k=2': dict(method='split', k=2),
    'split, k=4': dict(method='split'), 'split, k=8': dict(method='split', k=8),
    'per_example': dict(method='per_example'), 'sequential': dict(method='sequential'),
    'stack and concatenate': 'stack'}
ours = 'accumulate','split, k=2','split, k=4'
only_cost = 'plain training','split, k=8'

# --- cost

def cost_learner(model, data):
    from fastai.vision.models.xresnet import xresnet18
    set_seed(0)
    if model=='xresnet18': return image_learner(torch.randn(640,3,32,32), torch.randint(0,10,(640,)), xresnet18(n_out=10), bs=32)
    return image_learner(*mnist_tensors(data, 12800), small_convnet())

def one_cost(model, method, batches, data):
    "Print seconds and peak memory of one run in this process"
    learn,kw = cost_learner(model, data).remove_cb(ProgressCallback),methods[method]
    x,y = learn.dls.one_batch()
    learn.loss_func(learn.model(x), y).backward() # warm up the kernels
    learn.model.zero_grad()
    start = time.perf_counter()
    with learn.no_logging():
        if isinstance(kw, dict): learn.bs_find(1e-3, num_it=batches, show_plot=False, suggest_funcs=None, **kw)
        else: learn.fit(math.ceil(batches/len(learn.dls.train)), 1e-3, cbs=(StackFinder if kw else StopAfter)(batches))
    print(json.dumps(dict(seconds=time.perf_counter()-start, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)))

def costs(args, done):
    "A row for each run; methods that `done` has not are measured in new rounds, each with plain training"
    known,rows = set(done.method),[]
    first = done['round'].max()+1 if len(done) else 0
    for r,(model,batches) in itertools.product(range(args.rounds), (('xresnet18',60), ('convnet',600))):
        for m in methods:
            if (model,m)==('xresnet18','per_example'): continue # it has batch norm
            if m in known and m != 'plain training': continue
            out = subprocess.run([
                sys.executable, '-W', 'ignore', __file__, '--data', str(args.data), '--one', model, m,
                str(batches)], check=True, capture_output=True, text=True).stdout
            rows.append(dict(round=first+r, model=model, method=m, batches=batches, **json.loads(out.splitlines()[-1])))
    return pd.DataFrame(rows)

# --- truth

def fixed(task, data):
    "A learner after a short training, with its exact noise and scale"
    make,lr,batches = {'mnist': (mnist,.05,100), 'adult': (adult_mlp,1e-3,100)}[task]
    set_seed(0)
    learn = make(data).remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, lr, cbs=StopAfter(batches))
    items = all_items(learn.dls.train)
    noise,scale = exact_noise_and_scale(learn.model, learn.loss_func, items, learn.dls.n_inp)
    if task=='adult': scale += noise/len(items[0]) # fastai's tabular loader draws with replacement: the items are all there is
    return learn,noise,scale

def truths(task, args, done):
    "A row for each search with a method that `done` has not, as shares of the exact values"
    learn,noise,scale = fixed(task, args.data)
    rows,ns = [],noise/scale
    for m,kw in methods.items():
        if m in (*only_cost, *done.method): continue
        for run in range(args.runs if m in ours else args.runs//4):
            set_seed(run)
            learn.dls.train.rng = random.Random(run)
            if kw=='stack':
                finder = StackFinder(200)
                weights = [p.detach().clone() for p in learn.model.parameters()]
                with learn.no_logging(): learn.fit(1, 1e-12, cbs=finder)
                for p,w in zip(learn.model.parameters(), weights): p.data.copy_(w)
                (n,s),(low,high) = finder.running.means(),(math.nan,math.nan)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    learn.bs_find(1e-12, num_it=200, show_plot=False, suggest_funcs=None, **kw)
                last = learn.recorder.bs_find_stats.iloc[-1]
                n,s,low,high = last.noise,last.scale,last.lower,last.upper
            rows.append(dict(
                method=m, run=run, noise=n/noise, scale=s/scale, noise_scale=noise_scale(n,s)/ns, lower=low/ns,
                upper=high/ns))
    for run in range(0 if 'tol=0.25' in set(done.method) else args.runs//2):
        set_seed(run)
        learn.dls.train.rng = random.Random(run)
        learn.bs_find(1e-12, tol=.25, show_plot=False, suggest_funcs=None)
        last = learn.recorder.bs_find_stats.iloc[-1]
        rows.append(dict(
            method='tol=0.25', run=run, noise=last.noise/noise, scale=last.scale/scale, noise_scale=last.noise_scale/ns,
            lower=last.lower/ns, upper=last.upper/ns, n_iter=last.name))
    return pd.DataFrame(rows).assign(exact=ns)

def batch_norm(args, done):
    "A row for each model and k: `noise`, `scale` and `noise_scale` of `split` as multiples of those of `accumulate`"
    rows = []
    tasks = ('tabular_learner on Adult',adult,1e-3), ("article's convnet on MNIST",partial(mnist, model=article_model),.05)
    for task,make,lr in tasks:
        set_seed(0)
        learn = make(args.data).remove_cb(ProgressCallback)
        with learn.no_logging(): learn.fit(1, lr, cbs=StopAfter(100))
        res = {}
        for k,run in itertools.product((1,2,4,8), range(20)):
            set_seed(run)
            learn.dls.train.rng = random.Random(run)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                learn.bs_find(
                    1e-12, num_it=200, show_plot=False, suggest_funcs=None, beta=1,
                    **(dict(method='accumulate') if k==1 else dict(method='split', k=k)))
            res.setdefault(k, []).append((learn.recorder.noise[-1], learn.recorder.scale[-1]))
        res = {k: np.mean(o, 0) for k,o in res.items()}
        whole_n,whole_s = res.pop(1)
        for k,(n,s) in res.items():
            rows.append(dict(model=task, k=k, noise=n/whole_n, scale=s/whole_s, noise_scale=n/s/(whole_n/whole_s)))
    return pd.DataFrame(rows)

def kept(name, f, fresh, known):
    "What `f` measured, earlier or, where methods are missing, now"
    path = RESULTS/f'compare_{name}.csv'
    done = pd.read_csv(path) if path.exists() and not fresh else pd.DataFrame(columns=['method'])
    if set(known)-set(done.get('method', known)):
        pd.concat([o for o in (done, f(done)) if len(o)]).to_csv(path, index=False, float_format='%.6g')
    return pd.read_csv(path)

# --- what is printed

def cost_columns(df):
    "For each method, time and memory beyond plain training's"
    df = df.set_index(['model','method','round']).sort_index()
    def over(model, m, k): return df[k][model,m],df[k][model,'plain training']
    def ratio(model, m):
        if (model,m) not in df.index.droplevel('round'): return '-'
        a,b = over(model, m, 'seconds')
        return float((a/b).median())
    def extra(m):
        if ('xresnet18',m) not in df.index.droplevel('round'): return '-'
        a,b = over('xresnet18', m, 'peak')
        return float((a-b).median()/1e6)
    print("Time as a multiple of plain training: " + ', '.join(
        f"{1000*float((df.seconds[k,'plain training']/df.batches[k,'plain training']).median()):.1f} ms a batch of {k}"
        for k in ('xresnet18','convnet')))
    return {m: {'time, xresnet18': ratio('xresnet18',m), 'time, convnet': ratio('convnet',m), 'extra memory (MB)': extra(m)}
            for m in methods}

def truth_columns(task, df):
    "Bias, spread and coverage of the searches in `df`"
    cols = [f'{task}: {o}' for o in ('bias','spread','coverage')]
    if df.empty: return dict.fromkeys(cols, '-')
    sure = df.dropna(subset=['lower'])
    covered = ((sure.lower<=1) & (1<=sure.upper)).mean()
    spread = f'{100*df.noise_scale.std():.0f}%' if np.isfinite(df.noise_scale).all() else 'inf'
    bias = f'{100*(df.noise.mean()/df.scale.mean()-1):+.1f}%'
    return dict(zip(cols, (bias, spread, f'{100*covered:.1f}% of {len(sure)}' if len(sure) else '-')))

def main():
    p = parser(__doc__, data=True, rounds=5, runs=200)
    p.add_argument('--only', choices=('cost','mnist','adult','batch_norm'), help='measure this part and print nothing')
    p.add_argument('--fresh', action='store_true', help='measure again')
    p.add_argument('--one', nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: return one_cost(*args.one[:2], int(args.one[2]), args.data)
    searched = [o for o in (*methods, 'tol=0.25') if o not in only_cost]
    parts = {'cost': (partial(costs, args), methods), 'batch_norm': (partial(batch_norm, args), ['all']),
             'mnist': (partial(truths, 'mnist', args), searched), 'adult': (partial(truths, 'adult', args), searched)}
    res = {k: kept(k, f, args.fresh, known) for k,(f,known) in parts.items() if args.only in (None,k)}
    if args.only: return
    cost = cost_columns(res['cost'])
    print(f"Exact noise scales: {res['mnist'].exact[0]:.0f} (MNIST) and {res['adult'].exact[0]:.0f} (Adult)\n")
    table([{'method':m} | cost[m] | truth_columns('mnist', res['mnist'][res['mnist'].method==m])
           | truth_columns('adult', res['adult'][res['adult'].method==m]) for m in methods])
    for task in ('mnist','adult'):
        t = res[task][res[task].method=='tol=0.25']
        right = (t.noise_scale.sub(1).abs()<=.25).mean()
        print(f"{task}: tol=0.25 stops after {t.n_iter.median():.0f} batches (median of {len(t)}; at most {t.n_iter.max():.0f}), "
              f"and {100*right:.0f}% of the answers are within 25% of exact")
    print("\nBatch norm: `split` as a multiple of `accumulate`, at fixed weights\n")
    table(res['batch_norm'].to_dict('records'))

if __name__=='__main__': main()
