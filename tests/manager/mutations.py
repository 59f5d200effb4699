"""Bugs, one at a time: each changes a manager that was just made, through what it consists of."""

from kvcompress_jax.manager import prefix_cache
from kvcompress_jax.manager.page import NONE


def raw_pages_are_not_freed(manager, patch):
    patch.setattr(manager.raw, "give_back", lambda ids, tenant="": None)


def a_chunk_is_kept(manager, patch):
    back = manager.chunks.give_back
    patch.setattr(manager.chunks, "give_back", lambda ids, tenant="": back(list(ids)[1:], tenant))


def a_fork_shares_its_last_page(manager, patch):
    def fork(parent):
        child = manager._lives.add(parent.tenant)
        for page in parent.pages:
            manager.store.adopt(child, page)
        child.length = parent.length
        manager._lives.refresh(child)
        return child

    patch.setattr(manager._lives, "fork", fork)


def a_fork_copies_nothing(manager, patch):
    fork = manager._lives.fork

    def broken(parent):
        child = fork(parent)
        manager._lives.copies.clear()
        return child

    patch.setattr(manager._lives, "fork", broken)


def a_forked_parent_stays_shareable(manager, patch):
    fork = manager._lives.fork

    def broken(parent):
        before = parent.shareable
        child = fork(parent)
        parent.shareable = before
        return child

    patch.setattr(manager._lives, "fork", broken)


def floor_layers_are_forgotten(manager, patch):
    patch.setattr(manager.store, "floors", frozenset({1}))


def failed_seals_are_trusted(manager, patch):
    apply = manager.device.apply

    def broken(cache, plan):
        cache, sealed = apply(cache, plan)
        return cache, None if sealed is None else sealed | True

    patch.setattr(manager.device, "sealed", lambda cache: cache.sealed | True)
    patch.setattr(manager.device, "apply", broken)


def planes_come_back_to_another_page(manager, patch):
    take = manager.host.take

    def broken(uid):
        planes = take(uid)
        return planes if uid % 2 else planes[::-1]

    patch.setattr(manager.host, "take", broken)


def tables_keep_a_sealed_page_raw(manager, patch):
    seal = manager._tables.seal

    def broken(row, page):
        if page.index != 2:
            seal(row, page)

    patch.setattr(manager._tables, "seal", broken)


def prefixes_ignore_the_tenant(manager, patch):
    root = prefix_cache.root_key
    patch.setattr(prefix_cache, "root_key", lambda fingerprint, tenant: root(fingerprint, ""))


def prefixes_ignore_what_came_before(manager, patch):
    following = prefix_cache.next_key
    patch.setattr(prefix_cache, "next_key", lambda key, tokens: following(b"", tokens))


def prefixes_ignore_the_last_token(manager, patch):
    following = prefix_cache.next_key
    patch.setattr(prefix_cache, "next_key", lambda key, tokens: following(key, tokens[:-1]))


def a_hit_leaves_the_window_behind(manager, patch):
    patch.setattr(manager.device, "restore_raw", lambda cache, raw, image: cache)


def windows_come_without_their_attention(manager, patch):
    export = manager.device.export_raw

    def broken(cache, raw):
        image = export(cache, raw)
        image.mass[...] = 0
        return image

    patch.setattr(manager.device, "export_raw", broken)


def kept_pages_go_with_their_owner(manager, patch):
    release = manager.store.release

    def broken(page):
        kept, page.kept = page.kept, False
        release(page)
        page.kept = kept

    patch.setattr(manager.store, "release", broken)


def users_of_a_prefix_are_not_counted(manager, patch):
    leave = manager.prefixes.leave

    def broken(sequence):
        sequence.prefix = None
        leave(sequence)

    patch.setattr(manager.prefixes, "leave", broken)


def a_share_is_no_limit(manager, patch):
    patch.setattr(manager.raw, "room", lambda tenant="": manager.raw.free)
    patch.setattr(manager.raw, "_most", {})


def others_are_demoted_too(manager, patch):
    coldest = manager._control._coldest

    def broken(tenant, draft):
        for page in manager.pages.values():
            settled = page.level == 1 and page.sealed != NONE and not page.pending
            if settled and page.tenant != tenant and page.sealed not in draft.tables:
                return page
        return coldest(tenant, draft)

    patch.setattr(manager._control, "_coldest", broken)


def one_owner_demotes_for_all(manager, patch):
    ask = manager._control.ask

    def broken(sequence_id, indices):
        pages = manager._lives.find(sequence_id).pages
        ask(2, [p for p in pages if p.index in indices])

    patch.setattr(manager, "demote_pages", broken)


def a_resumed_page_has_a_wrong_level(manager, patch):
    put = manager.store.put_code
    patch.setattr(
        manager.store, "put_code", lambda page, sealed, level, heat: put(page, sealed, 1, heat)
    )


MUTATIONS = [
    value
    for name, value in sorted(globals().items())
    if callable(value) and getattr(value, "__module__", "") == __name__
]
