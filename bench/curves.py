"""Three real curves, as `bs_find` draws them: MNIST, Adult and a language model on the characters of Plato's Republic.

The noise scale depends on how far training has come. With its default options a search ends after one epoch of
batches, and `accumulate` steps once in `n_batch` of them; the rows with `num_it` go on for as many optimizer steps as
one epoch of normal training has, and `split` takes those steps within one epoch. The first are kept as
`results/curve_*.csv`, which `nbs/10_suggest.ipynb` reads. The row `mnist, article's model` has the residual convnet
of the article that brought the noise scale to fastai, all others of MNIST a plain small one."""
from common import *
from fastai.tabular.all import *

RESULTS = Path(__file__).resolve().parent/'results'

def article_model():
    "The residual convnet of the article"
    def conv2(ni, nf): return ConvLayer(ni, nf, stride=2)
    def conv_and_res(ni, nf): return nn.Sequential(conv2(ni,nf), SequentialEx(ConvLayer(nf,nf), ConvLayer(nf,nf), MergeLayer()))
    return nn.Sequential(
        conv_and_res(1,8), conv_and_res(8,16), conv_and_res(16,32), conv_and_res(32,16), conv2(16,10), nn.Flatten())

def mnist(path, model=small_convnet): return image_learner(*mnist_tensors(path), model(), opt_func=SGD)

def adult(path):
    cols = ('age workclass fnlwgt education education-num marital-status occupation relationship race sex '
            'capital-gain capital-loss hours-per-week native-country salary').split()
    df = pd.read_csv(need(path/'adult.csv'), names=cols, skipinitialspace=True, na_values='?')
    cat,cont = cols[1:2]+cols[3:4]+cols[5:10], ['age','fnlwgt','education-num']
    dls = TabularDataLoaders.from_df(
        df, procs=[Categorify,FillMissing,Normalize], cat_names=cat, cont_names=cont, y_names='salary', bs=64,
        valid_pct=.2, seed=42, device='cpu')
    return tabular_learner(dls, layers=[200,100])

class TinyLM(Module):
    "A transformer of two layers that predicts the next character"
    def __init__(self, n_vocab, n=64, seq_len=64):
        self.emb,self.pos,self.head = nn.Embedding(n_vocab,n), nn.Parameter(torch.randn(seq_len,n)*.02), nn.Linear(n,n_vocab)
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(n, 4, 4*n, dropout=0., batch_first=True, norm_first=True), 2,
            enable_nested_tensor=False)
        self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(seq_len))
    def forward(self, x): return self.head(self.body(self.emb(x)+self.pos, mask=self.mask, is_causal=True))

def republic(path, seq_len=64, n=64):
    text = need(path/'republic.txt').read_text(encoding='utf-8')
    vocab = sorted(set(text))
    ids = torch.tensor([vocab.index(c) for c in text])
    rows = (len(ids)-1)//seq_len
    return image_learner(
        ids[:rows*seq_len].view(rows,seq_len), ids[1:rows*seq_len+1].view(rows,seq_len), TinyLM(len(vocab), n, seq_len),
        bs=32)

tasks = {
    'mnist': (mnist,.05), 'adult': (adult,1e-3), 'republic': (republic,1e-3),
    "mnist, article's model": (partial(mnist, model=article_model),.05)}

def row(task, learn, lr, **kw):
    "Search, and what came out as a row of the table"
    with learn.no_bar(): sugg = learn.bs_find(lr, show_plot=False, **kw)
    ns = learn.recorder.bs_find_stats.noise_scale
    k = max(1, len(ns)//10)
    return dict(task=task, options=', '.join(f'{k}={v}' for k,v in kw.items()) or 'defaults', **{
        'optimizer steps': len(ns) if 'method' not in kw else int(ns.index[-1]), 'first':float(ns.iloc[0]),
        'lowest':float(ns.min()), 'end (median of last tenth)':float(ns.iloc[-k:].median()),
        'critical':str(sugg.critical), 'summary':learn.recorder.bs_find_summary()})

def main():
    p = parser(__doc__, data=True, seed=0)
    p.add_argument('--task', choices=tasks, help='only this one')
    args = p.parse_args()
    RESULTS.mkdir(exist_ok=True)
    rows = []
    for task,(make,lr) in tasks.items():
        if args.task not in (None,task): continue
        def fresh():
            set_seed(args.seed)
            return make(args.data)
        rows.append(row(task, fresh(), lr))
        for method in ('split','sequential'): rows.append(row(task, fresh(), lr, method=method))
        learn = fresh()
        rows.append(row(task, learn, lr, num_it=5*len(learn.dls.train)))
        if task.isalpha(): learn.recorder.bs_find_stats.to_csv(RESULTS/f'curve_{task}.csv', float_format='%.6g')
    table(rows)

if __name__=='__main__': main()
