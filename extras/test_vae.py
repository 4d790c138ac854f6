"""Video autoencoders: in pieces as at once, causal, and in the layouts of the public files."""

import math
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from extras.testing import (SMALL_VAE, TAEW21, TAEW22, WAN21, WAN22, all_equal, assert_error,
                            assert_near, folder, linear_vae, new_vae, rand, rand_like, randomised,
                            same, saved, wan_video)
from motionstream import UserError
from vae import (STATISTICS, CausalConv, ChannelNorm, LinearVAE, LinearVAEConfig, MemBlock, Repack,
                 TinyVAE, TinyVAEConfig, WanVAE, WanVAEConfig, load_vae)


def new_wan_vae(config):
    return randomised(WanVAE(config))


# --------------------------------------------------------------------------------------------------
# What all of them promise.

def decode_in_pieces(decode, latents, lengths):
    """The videos of the pieces and the state after each, which what comes later does not change."""
    videos = []
    states = []
    copies = []
    state = None
    for piece in latents.split(lengths, 2):
        video, state = decode(piece, state)
        videos.append(video)
        states.append(state)
        copies.append([t.clone() for t in state])
    for state, before in zip(states, copies):
        assert all_equal(state, before)
    return videos, states


def test_tiny_videos_decoded_in_pieces_are_the_whole_and_the_state_stays():
    vae = new_vae()
    z = 2 * rand(2, 4, 9, 3, 4)
    whole, _ = vae.decode(z)
    unclamped, _ = vae.decode_unclamped(z)
    assert whole.abs().max() == 1
    assert unclamped.abs().max() > 1                            # so it had to be clamped
    videos, states = decode_in_pieces(vae.decode, z, [3, 1, 3, 2])
    assert [video.shape[2] for video in videos] == [9, 4, 12, 8]
    assert videos[0].shape == (2, 3, 9, 24, 32)
    assert torch.cat(videos, 2).equal(whole)
    second = z[:, :, 3:4]
    again, _ = vae.decode(second, states[0])
    assert again.equal(videos[1])                               # the old state still works
    other, _ = vae.decode(second)
    assert not other.equal(videos[1][:, :, 3:])                 # and matters


def test_wan_videos_decoded_in_pieces_are_the_whole_and_the_state_stays():
    for config in WAN21, WAN22:
        vae = new_wan_vae(config)
        z = 2 * rand(2, config.latent_channels, 6, 1, 2)
        whole, _ = vae.decode(z)
        assert whole.abs().max() == 1
        videos, states = decode_in_pieces(vae.decode, z, [1, 3, 2])
        assert [video.shape[2] for video in videos] == [1, 12, 8]
        assert torch.cat(videos, 2).equal(whole)
        again, _ = vae.decode(z[:, :, 1:4], states[0])
        assert again.equal(videos[1])                           # the old state still works
        other, _ = vae.decode(z[:, :, 4:], states[0])
        assert not other.equal(videos[2])                       # and matters
        begin, _ = vae.decode(z[:, :, :3])
        assert begin.equal(whole[:, :, :9])


def test_latents_of_another_vae_and_videos_without_time_are_refused():
    for vae in new_vae(), linear_vae(), new_wan_vae(WAN21):
        channels = vae.config.latent_channels
        shapes = f"latents (1, 7, 2, 1, 1), those of this VAE are (B, {channels}, F, h, w)"
        assert_error(AssertionError, shapes, vae.decode, rand(1, 7, 2, 1, 1))
        frame = rand(1, channels, 1, 1)
        assert_error(AssertionError, f"latents (1, {channels}, 1, 1), those", vae.decode, frame)
        for shape in (1, 3, 32, 32), (1, 4, 1, 32, 32):
            text = f"video {shape}, expected (B, 3, T, H, W)"
            assert_error(AssertionError, text, vae.encode, rand(*shape))


def test_linear_videos_decoded_in_pieces_are_the_whole_and_there_is_no_state():
    vae = linear_vae()
    z = rand(2, 4, 7, 3, 5)
    whole, state = vae.decode_unclamped(z)
    assert whole.shape == (2, 3, 25, 24, 40)
    assert state == []
    videos, _ = decode_in_pieces(vae.decode_unclamped, z, [1, 3, 1, 2])
    assert_near(torch.cat(videos, 2), whole, 1e-6)
    unclamped, _ = vae.decode_unclamped(9 * z)
    clamped, _ = vae.decode(9 * z)
    assert clamped.max() == 1
    assert clamped.equal(unclamped.clamp(-1, 1))


def test_a_vae_computes_in_the_dtype_of_its_weights():
    for vae, channels in (new_vae(), 4), (linear_vae(), 4), (new_wan_vae(WAN21), 16):
        video = rand(1, 3, 5, 16, 24).clamp(-1, 1)
        z = rand(1, channels, 2, 2, 3)
        latents = vae.encode(video)
        decoded, _ = vae.decode(z)
        vae.to(torch.bfloat16)
        found_latents = vae.encode(video)
        found, state = vae.decode(z)
        for t in [found_latents, found] + state:
            assert t.dtype == torch.bfloat16
        assert_near(found_latents.float(), latents, 0.05)
        assert_near(found.float(), decoded, 0.05)


def change_of_latents(vae, video, latents, frames):
    """By how much each latent of the clip changes, (F,), when these frames do."""
    other = video.clone()
    other[:, :, frames] += 0.5
    change = vae.encode(other) - latents
    return change.abs().amax((0, 1, 3, 4))


# --------------------------------------------------------------------------------------------------
# The tiny VAE, in the layout of TAEHV.

def taehv_shapes(channels, pixels):
    """{name: shape} of TAEHV's files for Wan: taew2_1 is of (16, 3), taew2_2 of (48, 12)."""
    shapes = {}

    def conv(name, outputs, inputs):
        shapes[f"{name}.weight"] = (outputs, inputs, 3, 3)
        shapes[f"{name}.bias"] = (outputs,)

    def conv_without_bias(name, outputs, inputs, kernel=3):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)

    def three_blocks(part, first, width):
        for i in range(first, first + 3):
            conv(f"{part}.{i}.conv.0", width, 2 * width)        # a frame and the one before
            conv(f"{part}.{i}.conv.2", width, width)
            conv(f"{part}.{i}.conv.4", width, width)

    conv("encoder.0", 64, pixels)
    for i, packed in (2, 128), (7, 128), (12, 64):              # two frames in one, or one
        conv_without_bias(f"encoder.{i}.conv", 64, packed, kernel=1)
        conv_without_bias(f"encoder.{i + 1}", 64, 64)
        three_blocks("encoder", i + 2, 64)
    conv("encoder.17", channels, 64)
    conv("decoder.1", 256, channels)
    for i, width, unpacked, outputs in (3, 256, 256, 128), (9, 128, 256, 64), (15, 64, 128, 64):
        three_blocks("decoder", i, width)
        conv_without_bias(f"decoder.{i + 4}.conv", unpacked, width, kernel=1)
        conv_without_bias(f"decoder.{i + 5}", outputs, width)
    conv("decoder.22", pixels, 64)
    return shapes


def parameters_of(module):
    return sum(p.numel() for p in module.parameters())


def test_the_tiny_vae_has_the_layouts_of_taew2_1_and_taew2_2():
    with torch.device("meta"):
        vae = TinyVAE(TAEW21)
    found = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
    assert found == taehv_shapes(16, 3)
    assert parameters_of(vae.encoder) == 1_470_928
    assert parameters_of(vae.decoder) == 9_844_611
    assert vae.stride == 8
    for config, stride, pixels in (TAEW21, 8, 3), (TAEW22, 16, 12):
        tensors = {}
        for name, shape in taehv_shapes(config.latent_channels, pixels).items():
            tensors[name] = rand(*shape).half()
        for loaded in loaded_from_files(tensors):
            assert loaded.config == config
            assert loaded.stride == stride
            for name, t in loaded.state_dict().items():
                assert t.equal(tensors[name].float())


def loaded_from_files(tensors):
    """The TinyVAE in a .safetensors and in a .pth of these."""
    with folder() as here:
        save_file(tensors, here / "taew.safetensors")
        torch.save(tensors, here / "taew.pth")
        one = TinyVAE.from_pretrained(here / "taew.safetensors")
        two = TinyVAE.from_pretrained(here / "taew.pth")
    return one, two


# Public files, but narrow, and of other widths at each place.
NARROW21 = TinyVAEConfig(
    stem=8,
    encoder=((10, 3, 2, 2), (12, 3, 2, 2), (14, 3, 1, 2)),
    decoder=((16, 3, 1, 2), (9, 3, 2, 2), (7, 3, 2, 2)),
    tail=6)
NARROW22 = replace(NARROW21, latent_channels=48, patch=2)


def test_the_vae_reads_its_config_off_public_files_and_its_own():
    for config in NARROW21, NARROW22:
        vae = new_vae(config)
        z = rand(1, config.latent_channels, 2, 2, 2)
        video, state = vae.decode(z)
        for loaded in loaded_from_files(vae.state_dict()):
            assert loaded.config == config
            again, _ = loaded.decode(z)
            assert again.equal(video)
        nothing = [torch.zeros_like(t) for t in state]
        continued, _ = vae.decode(z, nothing)                   # all is zero before a public clip
        assert continued[:, :, 3:].equal(video)
    vae = new_vae()
    with folder() as here:
        saved(here / "own.safetensors", vae, dtype=torch.float16)
        loaded = TinyVAE.from_pretrained(here / "own.safetensors")
    assert loaded.metadata() == vae.metadata()
    for p in loaded.parameters():
        assert p.dtype == torch.float32


def test_tiny_latents_are_softly_limited_and_pixels_run_from_0_to_1_inside():
    vae = new_vae(NARROW21)
    z = rand(1, 16, 1, 2, 2)
    large, _ = vae.decode_unclamped(1e4 * z)
    larger, _ = vae.decode_unclamped(1e6 * z)
    assert large.equal(larger)                                  # 3 tanh(z / 3)
    once, _ = vae.decode_unclamped(z)
    twice, _ = vae.decode_unclamped(3 * torch.tanh(z / 3))
    assert not once.equal(twice)
    last = vae.decoder[-1]
    last.weight.zero_()
    for inside, outside in (0, -1), (0.5, 0), (1, 1):
        nn.init.constant_(last.bias, inside)
        video, _ = vae.decode(z)
        assert (video == outside).all()


def decoded_layer_by_layer(layers, z):
    """TAEHV's decoder, layer by layer and frame by frame: latents (C, F, h, w) to (T, 3, H, W)."""
    frames = [3 * torch.tanh(frame / 3) for frame in z.unbind(1)]
    for layer in layers:
        done = []
        before = frames[0]
        for frame in frames:
            if isinstance(layer, MemBlock):
                pair = torch.cat([frame, before])[None]
                done.append(F.relu(layer.conv(pair)[0] + frame))
            elif isinstance(layer, Repack):
                done += layer.conv(frame[None])[0].chunk(layer.grow)
            else:
                done.append(layer(frame[None])[0])
            before = frame
        frames = done
    return 2 * F.pixel_shuffle(torch.stack(frames), 2)[3:] - 1


def check_folded_stages(stages):
    config = replace(SMALL_VAE, patch=2, decoder=stages, tail=5)
    vae = new_vae(config).requires_grad_(True)
    z = rand(2, 4, 3, 3, 4)
    video, _ = vae.decode_unclamped(z)
    plain = torch.stack([decoded_layer_by_layer(vae.decoder, one) for one in z])
    plain = plain.transpose(1, 2)                               # (B, 3, T, H, W)
    assert_near(video, plain, 1e-5)
    parameters = list(vae.decoder.parameters())
    weight = rand_like(video)
    found = torch.autograd.grad((video * weight).sum(), parameters)
    expected = torch.autograd.grad((plain * weight).sum(), parameters)
    for a, b in zip(found, expected):
        assert b.any()
        assert_near(a, b, 1e-4)


def test_a_stage_of_the_tiny_decoder_in_one_convolution_is_its_layers_and_learns_as_they_do():
    check_folded_stages(((6, 1, 4, 2), (5, 1, 1, 1)))
    check_folded_stages(((6, 2, 2, 3), (4, 1, 2, 2)))


def test_encoding_in_pieces_equals_the_whole_and_an_image_is_the_first_latent():
    video = rand(2, 3, 29, 16, 24).clamp(-1, 1)
    for pad in "front", "end":
        vae = new_vae(replace(SMALL_VAE, pad=pad))
        whole = vae.encode(video, piece=100)
        assert whole.shape == (2, 4, 8, 2, 3)
        for piece in 1, 3, 4:
            assert_near(vae.encode(video, piece), whole, 1e-6)
    vae = new_vae()
    image = vae.encode(video[:, :, :1])
    assert_near(image, vae.encode(video)[:, :, :1], 1e-6)
    assert_error(AssertionError, "28", vae.encode, video[:, :, :28])
    assert_error(AssertionError, "20", vae.encode, video[..., :20])


def test_no_latent_sees_the_future_with_front_padding():
    video = rand(1, 3, 21, 16, 16).clamp(-1, 1)
    for pad, ahead in ("front", 0), ("end", 3):                 # frames that are seen too early
        vae = new_vae(replace(SMALL_VAE, pad=pad))
        latents = vae.encode(video)
        for frame in range(1, 21):
            change = change_of_latents(vae, video, latents, frame)
            first = (change > 1e-6).int().argmax()
            assert first == math.ceil((frame - ahead) / 4), (pad, frame)
            assert change[first] > 1e-6


# --------------------------------------------------------------------------------------------------
# The linear VAE.

def test_the_linear_code_moves_with_the_picture():
    vae = linear_vae()
    wide = rand(1, 3, 9, 32, 96).clamp(-1, 1)
    latents = vae.encode(wide)
    assert latents.shape == (1, 4, 3, 4, 12)
    assert vae.stride == 8
    shifted = vae.encode(wide[..., 8:])                         # by one cell
    assert_near(shifted[..., 1:], latents[..., 2:], 1e-6)
    assert not shifted[..., 0].equal(latents[..., 1])           # the rim, whose pixels are repeated
    change = change_of_latents(vae, wide, latents, slice(5, 9))
    assert not change[:2].any()
    assert change[2] > 0.1
    assert_error(AssertionError, "this one has 8", vae.encode, wide[:, :, :8])
    assert_error(AssertionError, "95x32", vae.encode, wide[..., 1:])


def test_a_linear_code_is_linear():
    vae = linear_vae()
    one = rand(2, 4, 7, 3, 5)
    two = one.flip(2)
    nothing, _ = vae.decode_unclamped(0 * one)                  # the bias

    def decoded(z):
        video, _ = vae.decode_unclamped(z)
        return video - nothing

    assert_near(decoded(one + 2 * two), decoded(one) + 2 * decoded(two), 1e-4)


def test_a_linear_code_of_principal_components_gives_back_what_it_can_hold():
    channels = 3 * 4 * 8 * 8                                    # all pixels of a cell: no loss
    vae = LinearVAE(LinearVAEConfig(channels)).requires_grad_(False)
    pixels = torch.eye(channels).view(channels, 12, 8, 8)
    for layer in vae.encoder, vae.decoder:
        layer.weight.zero_()
        layer.weight[:, :, 4:12, 4:12] = pixels                 # of a window that is 16 pixels wide
        layer.bias.zero_()
    video = rand(1, 3, 9, 16, 24).clamp(-1, 1)
    again, _ = vae.decode(vae.encode(video))
    assert_near(again, video, 1e-6)
    assert_near(vae.pixel_weight(), torch.ones(channels), 1e-6)


def test_a_channel_is_worth_what_it_changes_in_pixels():
    vae = linear_vae()
    before = vae.pixel_weight()
    vae.decoder.weight[0] *= 3
    weight = vae.pixel_weight()
    assert_near(weight[0] / weight[1], 3 * before[0] / before[1], 1e-6)
    assert_near(weight.square().mean(), torch.tensor(1.0), 1e-6)


def test_a_linear_vae_comes_back_from_its_file():
    vae = linear_vae(5)
    std = torch.arange(5) + 0.5
    vae.latent_std.copy_(std)
    tensors = {name: t.contiguous() for name, t in vae.state_dict().items()}
    with folder() as here:
        path = here / "vae.safetensors"
        save_file(tensors, path, vae.metadata())
        back = load_vae(path)
        assert back.config == vae.config
        assert same(back.state_dict(), vae.state_dict())
        assert back.latent_std.equal(std)
        assert not back.training
        for cls in WanVAE, TinyVAE:
            text = f"vae.safetensors: a LinearVAE, not a {cls.__name__}; load_vae opens any"
            assert_error(UserError, text, cls.from_pretrained, path)


def test_tensors_of_our_vaes_that_have_lost_their_config_are_not_guessed_at():
    for vae, first in (linear_vae(), "decoder.bias"), (new_vae(), "decoder.1.bias"):
        tensors = {name: vae.state_dict()[name].contiguous() for name in sorted(vae.state_dict())}
        with folder() as here:
            save_file(tensors, here / "a.safetensors")
            torch.save(tensors, here / "a.pt")
            for path in here / "a.safetensors", here / "a.pt":
                text = f"{path}: holds no config, and its first tensor, {first}, is in no VAE of"
                assert_error(UserError, text, load_vae, path)


# --------------------------------------------------------------------------------------------------
# The VAE of Wan, small.

def test_the_wan_vae_has_the_sizes_of_wans_files():
    wan22 = WanVAEConfig(48, 160, 256, residual=True)
    for config, stride, tensors, parameters in (
            (WanVAEConfig(), 8, 194, 126_892_531),
            (wan22, 16, 196, 704_688_668)):
        with torch.device("meta"):
            vae = WanVAE(config)
        assert len(vae.state_dict()) == tensors
        assert parameters_of(vae) == parameters
        assert vae.stride == stride
        mean, std = STATISTICS[config.latent_channels]
        assert len(mean) == config.latent_channels
        assert len(std) == config.latent_channels
        assert min(std) > 0


GOLDEN = (
    (WAN21,
     (0.0554, 0.3683, 0.2857, -0.8449, 0.4626),
     (-0.5273, 0.5658, -0.7934, -0.8744, -0.2419)),
    (WAN22,
     (0.0503, 1.1569, 1.6741, -0.1905, 2.1264),
     (-0.1029, 0.3001, -0.0532, -0.0883, -0.3568)),
)


def told(t):
    """Mean, mean magnitude and three of the numbers."""
    summary = torch.stack([t.mean(), t.abs().mean()])
    return torch.cat([summary, t.flatten()[[1, 99, -2]]])


def test_the_wan_vae_gives_what_it_gave_when_it_agreed_with_diffusers():
    for config, of_latents, of_video in GOLDEN:
        vae = new_wan_vae(config)
        latents = vae.encode(wan_video(vae, 9))
        video, _ = vae.decode(latents)
        for t, expected in (latents, of_latents), (video, of_video):
            error = told(t) - torch.tensor(expected)
            assert error.abs().max() < 2e-3, told(t)


def test_the_wan_vaes_norm_has_no_eps_but_leaves_zeros():
    norm = ChannelNorm(6)
    x = rand(1, 6, 1, 2, 2)
    size = x.square().mean(1, keepdim=True).sqrt()
    assert_near(norm(x), x / size, 1e-6)
    assert_near(norm(1e-8 * x), norm(x), 1e-6)
    assert not norm(0 * x).any()


def test_wan_encoding_is_causal():
    for config in WAN21, WAN22:
        vae = new_wan_vae(config)
        video = wan_video(vae, 29)
        latents = vae.encode(video)
        assert latents.shape == (1, config.latent_channels, 8, 2, 3)
        image = vae.encode(video[:, :, :1])
        assert image.equal(latents[:, :, :1])
        begin = vae.encode(video[:, :, :13])
        assert begin.equal(latents[:, :, :4])
        assert_error(AssertionError, "28", vae.encode, video[:, :, :28])
        narrower = str(3 * vae.stride - 1)
        assert_error(AssertionError, narrower, vae.encode, video[..., 1:])


def test_wan_encoding_holds_few_frames_however_long_the_clip():
    for config in WAN21, WAN22:
        vae = new_wan_vae(config)
        video = wan_video(vae, 29)
        assert most_numbers(vae, video[:, :, :9]) == most_numbers(vae, video)


def most_numbers(vae, video):
    """The largest input of a convolution while a video is encoded; the state that is kept from
    piece to piece is no view of more."""
    sizes = []
    kept = []

    def record(module, inputs, output):
        x, _, memory = inputs
        sizes.append(x.numel())
        kept.extend(memory)

    forward = CausalConv.register_forward_hook
    hooks = [forward(m, record) for m in vae.modules() if isinstance(m, CausalConv)]
    vae.encode(video)
    for hook in hooks:
        hook.remove()
    for t in kept:
        assert t.untyped_storage().nbytes() == 4 * t.numel(), t.shape
    return max(sizes)
