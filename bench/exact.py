"""Is the number right? `bs_find` at fixed weights against the exact values.

A small convnet on all of MNIST, trained for `--steps` batches so that its gradients are those of a real training; then its weights
stay where they are (learning rate 1e-12) while `bs_find` measures for one epoch with each of `--seeds` shuffles. Exact values: the
gradients of all 60,000 images, one by one (`torch.func`, float64)."""
from common import *

def main():
    args = parser(__doc__, data=True, steps=100, seeds=10, bs=64, n_batch=20).parse_args()
    x,y = mnist_tensors(args.data)
    set_seed(0)
    learn = image_learner(x, y, small_convnet(), bs=args.bs, opt_func=SGD)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05, cbs=StopAfter(args.steps))
    exact = dict(zip(('noise','scale'), exact_noise_and_scale(learn.model, x, y)))
    exact['noise_scale'] = exact['noise']/exact['scale']
    rows = []
    for method in estimators:
        for seed in range(args.seeds):
            set_seed(seed)
            measured = image_learner(x, y, learn.model, bs=args.bs, opt_func=SGD)
            with measured.no_bar(): measured.bs_find(1e-12, n_batch=args.n_batch, method=method, show_plot=False)
            rows.append({'method':method, **{k: getattr(measured.recorder,k)[-1]/exact[k] for k in exact}})
    print(f"Exact, after {args.steps} batches: " + ', '.join(f'{k} {v:.4g}' for k,v in exact.items()))
    print(f"Measured / exact over one epoch of batches of {args.bs}, n_batch {args.n_batch}, mean ± standard deviation of {args.seeds} seeds:")
    by = pd.DataFrame(rows).groupby('method', sort=False)
    mean,std = by.mean(),by.std()
    table([{'method':m, **{k: f'{mean.loc[m,k]:.4f} ± {std.loc[m,k]:.4f}' for k in exact}} for m in mean.index])
    worst = float((mean.loc['accumulate']-1).abs().max())
    print(f"accumulate: the mean over seeds is at most {100*worst:.2f}% off")

if __name__=='__main__': main()
