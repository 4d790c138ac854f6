"""What sample.py tells the user about a job before it samples: what is cropped, hidden, unknown or
not specified.
"""

# The vocabulary of the shipped tiny model: "fading light, spinning shapes" (extras/world.py).
WORDS = ("steady", "fading", "warming", "light", "spinning", "pulsing", "shapes")


def print_notes(job, words, tracks, motion, image_size, shown):
    """Print all notes on a sample.Job. words: of its prompt; tracks: on the image (width, height);
    motion: the same in the video; shown: the part of the image in it, see part_in_words."""
    notes = list(job.notes) + on_words(job, words)
    left, top, _, _ = shown
    if max(left, top) >= 0.5:
        width, height = image_size
        notes.append(f"the image of {width}x{height} pixels is cropped, the video shows "
                     f"{part_in_words(shown)}")
    notes += on_tracks(job, tracks, motion)
    if tracks.fps not in (None, job.fps):
        notes.append(f"the tracks are at {tracks.fps:g} frames/s, the video at {job.fps:g}; "
                     "they are not resampled")
    for note in notes:
        print(f"note: {note}")


def part_in_words(shown):
    """Words for a part of an image, (left, top, right, bottom)."""
    left, top, right, bottom = shown
    return f"x from {left:.0f} to {right:.0f} and y from {top:.0f} to {bottom:.0f}"


def unknown_words(words):
    """The words that the tiny model was not trained on: to it they are noise."""
    return [word for word in words if word not in WORDS]


def on_words(job, words):
    """Notes on prompt words that the tiny model does not read, or was not trained on."""
    config = job.config
    if config.text_encoder != "words":
        return []
    notes = []
    if len(words) > config.text_len:
        notes.append(f"only the first {config.text_len} words of {job.prompt!r} are read")
    unknown = dict.fromkeys(unknown_words(words))           # an ordered set
    if unknown:
        notes.append(f"the tiny model never learned {', '.join(unknown)}, which is noise to it; it "
                     f"knows {', '.join(WORDS)}")
    return notes


def on_tracks(job, tracks, motion):
    """Notes on what is lost of the tracks on the way to the motion."""
    notes = []
    given = len(tracks.tracks)
    if job.frames > given:
        notes.append(f"the tracks end after {given} frames, the last {job.frames - given} are not "
                     "specified")
    visible = tracks.visible[:motion.visible.shape[1]].sum()
    lost = visible - motion.visible.sum().item()
    if lost:
        notes.append(f"{lost} of {visible} visible track points lie outside the video and are "
                     "hidden")
    kind = job.config.track_id_mode
    if tracks.ids is not None and tracks.id_mode != kind:
        notes.append(f"the IDs of these weights are of the kind {kind!r}, not {tracks.id_mode!r}; "
                     "the file's ids are not used")
    if not motion.visible.any():
        notes.append("no track is seen in the video, nothing is specified")
    return notes
