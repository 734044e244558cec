// What has been made of tensors, kept for the next call with the same ones: packed weights of frozen layers.
//
// A tensor is the same as long as it lives, lies where it lay and has not been written to since, as far as torch counts
// that: what `.data` or a raw pointer writes, it does not see, and of a tensor made in inference mode it keeps no
// count, so that nothing is kept either. Of tensors that have changed, what was made before goes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

template <typename Made>
class Kept {
 public:
  // What make() has made of these tensors, now or before.
  template <typename Make>
  static std::shared_ptr<Made> of(at::TensorList tensors, const Make& make) {
    for (const at::Tensor& tensor : tensors) {
      if (tensor.is_inference()) return make();
    }
    std::shared_ptr<Made> made;
    with_entries([&](std::vector<Entry>& entries) {
      for (const Entry& entry : entries) {
        if (entry.is_of(tensors)) made = entry.made;
      }
    });
    if (made) return made;
    made = make();
    with_entries([&](std::vector<Entry>& entries) {
      // Of tensors that are gone; and of these, before they changed or by another thread that was faster.
      const auto is_over = [&](const Entry& entry) { return entry.is_over() || entry.was_of(tensors); };
      entries.erase(std::remove_if(entries.begin(), entries.end(), is_over), entries.end());
      entries.emplace_back(tensors, made);
    });
    return made;
  }

 private:
  struct Source {
    explicit Source(const at::Tensor& tensor)
        : tensor(tensor.getIntrusivePtr()),
          storage(tensor.storage().getWeakStorageImpl()),
          data(tensor.const_data_ptr()),
          version(tensor._version()) {}
    bool was(const at::Tensor& other) const {
      return !tensor.expired() && tensor._unsafe_get_target() == other.unsafeGetTensorImpl();
    }
    // What `.data` is set to is counted nowhere, and may lie where something lay before that is gone.
    bool is(const at::Tensor& other) const {
      return was(other) && !storage.expired() &&
             storage._unsafe_get_target() == other.storage().unsafeGetStorageImpl() && data == other.const_data_ptr() &&
             version == other._version();
    }
    c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> tensor;
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    const void* data;
    int64_t version;
  };

  struct Entry {
    Entry(at::TensorList tensors, std::shared_ptr<Made> made)
        : sources(tensors.begin(), tensors.end()), made(std::move(made)) {}
    bool is_of(at::TensorList tensors) const {
      return std::equal(sources.begin(), sources.end(), tensors.begin(), tensors.end(),
                        [](const Source& source, const at::Tensor& tensor) { return source.is(tensor); });
    }
    bool was_of(at::TensorList tensors) const {
      return std::equal(sources.begin(), sources.end(), tensors.begin(), tensors.end(),
                        [](const Source& source, const at::Tensor& tensor) { return source.was(tensor); });
    }
    bool is_over() const {
      return std::any_of(sources.begin(), sources.end(),
                         [](const Source& source) { return source.tensor.expired() || source.storage.expired(); });
    }
    std::vector<Source> sources;
    std::shared_ptr<Made> made;
  };

  struct All {
    std::mutex mutex;
    std::vector<Entry> entries;
  };

  // A child of fork whose parent had the lock in another thread goes without.
  template <typename Body>
  static void with_entries(const Body& body) {
    constexpr int kTries = 10'000;
    for (int i = 0; i < kTries; ++i, std::this_thread::yield()) {
      const std::unique_lock lock(all_.mutex, std::try_to_lock);
      if (lock) return body(all_.entries);
    }
  }

  static inline All& all_ = *new All();  // never destroyed: calls may come after it would have been
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
