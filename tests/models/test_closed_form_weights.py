"""The published models on weights and inputs given by formulas: figures known to nine digits."""

from kdcmae_fast.models import Batch


def test_pretraining_losses(load, published, formula_plans, clips, near):
    shapes = published.pretrained_shapes()
    assert len(shapes) == 527
    model = load(shapes)
    assert model.config.audio_length == 96
    losses = model(clips, formula_plans)
    near(losses.total, 8.564477177)
    near(losses.mae_audio, 6.122032910)
    near(losses.mae_video, 2.431458745)
    near(0.01 * losses.contrastive, 0.010985522)


def test_features(load, published, clips, near):
    features = load(published.pretrained_shapes()).encode(clips.fbank[:1], clips.frames[:1])
    near(features.audio[0, :3], [-0.15171919, -0.14671526, -0.22349150])
    near(features.video[0, :3], [0.11039357, -0.43557941, -0.26667098])


def test_classifier(load, published, clips, near):
    shapes = published.classifier_shapes()
    assert len(shapes) == 478
    model = load(shapes)
    first = Batch(*(tensor[:1] for tensor in clips))
    logits = [2.18432368, -3.98634257, -2.96147118, 3.27247809, 3.33289962]
    near(model(first.fbank, first.frames)[0], logits)
    near(model(fbank=first.fbank, mode="audio")[0, 0], 3.23493463)
    near(model(frames=first.frames, mode="video")[0, 0], 2.8450735)
    near(model(fbank=first.fbank, mode="missing_video")[0, 0], 3.02442246)
    near(model(frames=first.frames, mode="missing_audio")[0, 0], 2.44980084)
