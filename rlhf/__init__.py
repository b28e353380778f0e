"""What the scripts share. The modules, in the order in which data flows through them.

    files        a local path or an id on the Hub to rows
    sources      rows of a public data set, in any of its forms, to one form
    language     which texts are in the language asked for
    splits       which prompt goes to which split and side
    records      what `.data` holds: schema, reading, writing, validation
    token_cache  ids of texts that were tokenised before
    templates    how a conversation is written: tags, or a tokenizer's own chat template
    tokens       a record to prompt_ids and response_ids
    rankings     scored responses to one prompt, and their pairs
    batches      ids to padded tensors, in a seeded, length-grouped order
    heads        whether logits are a linear layer's, or more
    models       policy, reference, reward model and critic
    lora         adapters: a few trained weights beside frozen ones
    logprobs     hidden states to log-probabilities of tokens and of sequences
    sampling     logits to tokens, with seeded noise
    kv_cache     what a decode loop remembers of its prompts
    responses    what is being written, and the rollout that it becomes
    generation   prompts to responses, in a batch of slots
    prompts      what the policy is to answer
    actors       policy, reference and critic, loaded
    experience   a rollout as policy, reference and critic see it, token by token
    comparisons  better and worse responses, and their logprobs under policy and reference
    rewards      a reward model's logit, or a Python function, to a score
    classifiers  any text classifier's logit to a score
    scorers      who scores the responses: our reward model or another
    samples      a few prompts and responses, for people to read
    masked       means over real tokens
    advantages   scores and KL to rewards, rewards and values to advantages
    losses       one function for each equation
    optim        the optimiser, its schedule and one step of it
    evaluation   how well scores rank responses, and how varied texts are
    winrates     how often one model beats another, and how sure that is
    verdicts     what a judge is asked, how its answer is read, what is kept of it
    endpoints    a language model behind a URL, asked one question
    judges       a language model compares responses, in both orders
    answers      what checkpoints write to the same prompts
    standings    scores and verdicts to figures, of each checkpoint against the first
    lineage      the run behind a checkpoint, and the runs that it came from
    cautions     what makes figures look better, or surer, than they are
    figures      how checkpoints stand beside each other, drawn
    report       what an evaluation found, as tables and a page
    disk         what appears on it whole or not at all; one writer for a folder
    checkpoints  folders that other tools load, and `run.json`
    snippets     lines of code that load a checkpoint
    cards        what a checkpoint's README.md tells of it
    earlier      the runs that a folder holds, and how one makes place
    trunk        policy, reference, critic and reward model on one trunk
    run_folder   one run of a stage: what it was made from, its checkpoints, `best`
    markdown     tables, and texts of which nothing is read as Markdown
    page         one HTML file that needs nothing else
    curves       training.png
    metrics      console, metrics.jsonl, trackers
    memory       what does not fit into it is done again in smaller parts
    resume       what a stopped run goes on from, and how it is stopped
    runtime      device, precision, seeds
    trackers     what TensorBoard, W&B and Trackio are told
    processes    several of them at one run, each with its share of a batch
    sharding     weights, gradients and moments that are cut up between processes
    arguments    argument types and checks
    chat         a conversation to an answer, a token at a time
    feedback     pairs that people make, in the files that DPO reads
    talks        several models in one conversation, and which answer was better
    chat_html    how a conversation looks
    gate         what a page's server lets through
    chat_page    the page to talk to the models
    errors       the two exceptions that end a script in one line

Shapes are written in comments with these letters:

    B sequences   P prompt tokens   R response tokens   T = P + R   V vocabulary   D hidden size

Prompts are padded on the left and responses on the right, so that a response is always
`sequence[:, P:]`. In every mask True means: this token counts.
"""
