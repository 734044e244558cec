// The uses of a table's rows, sorted by row: what gradients of tables and optimizers in backward go over.
//
// A use is an index of a bag that is not the padding. Its key holds the row in the upper bits, as many as the table
// needs, and below them the use's bag, or its position where that is wanted; the bag stands in the key so that neither
// a table of bags nor a division is needed. Keys are written in the order of the indices, and then sorted by row in one
// of these ways, by the number of keys that are left (the padding is often most of them) and by the bits of a row:
//   few, or a table of one row   std::sort, or nothing
//   frequent rows first          one pass of counting in which each of the first rows is a digit of its own, and all
//                                others are the last; words are numbered by frequency, so that most uses are sorted
//                                then
//   the rest                     counting digit by digit, from the lowest
// All are stable, as keys rise as they come but for the rows: a row's uses stay in the order of the indices.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bags.h"

namespace nlpkernels {
inline namespace CPU_CAPABILITY {

// The bits that hold 0 .. count - 1; 0 for a count of 0 or 1.
inline int bits(int64_t count) {
  int needed = 0;
  while (count - 1 > 0 && (count - 1) >> needed > 0) ++needed;
  return needed;
}

class SortedUses {
 public:
  // Of a table of so many rows. Positions are kept only if they are wanted: without them a use's bag is at hand.
  SortedUses(const Indices& indices, const Bags& bags, int64_t rows, int64_t padding_idx, bool wants_positions,
             int64_t threads)
      : wants_positions_(wants_positions),
        row_bits_(bits(rows)),
        shift_(bits(bags.total() == 0 ? 0
                    : wants_positions ? bags.total()
                                      : bags.count())) {
    constexpr int64_t most = int64_t(1) << 32;
    TORCH_CHECK_VALUE(row_bits_ + shift_ <= 64 && bags.total() < most && (bags.total() == 0 || bags.count() < most),
                      indices.op(), ": a table of ", rows, " rows, ", bags.total(), " indices and ", bags.count(),
                      " bags are too many together");
    if (row_bits_ + shift_ < 32) {
      sort<uint32_t>(indices, bags, padding_idx, threads);
    } else {
      sort<uint64_t>(indices, bags, padding_idx, threads);
    }
  }

  // Rows in use; the i-th one's uses are [start(i), start(i + 1)).
  int64_t rows() const { return count_; }
  int64_t start(int64_t i) const { return start_[i]; }
  int64_t row(int64_t i) const { return rows_[i]; }
  const int64_t* rows_begin() const { return rows_.get(); }
  // Where uses are. To be copied into a loop, like Indices.
  struct Places {
    const uint32_t *low, *bag_of;

    int64_t position(int64_t use) const { return low[use]; }  // if positions are wanted
    NLPKERNELS_INLINE int64_t bag(int64_t use) const { return bag_of != nullptr ? bag_of[low[use]] : low[use]; }
  };
  Places places() const { return {low_.get(), bag_of_.get()}; }

  // What a gradient of all rows before the i-th one takes: to write a row takes as long as to read some.
  int64_t work(int64_t i) const { return start_[i] + 3 * i; }
  // The first row before which there is so much work, or rows().
  int64_t row_from(int64_t work_before) const {
    int64_t first = 0, last = count_;
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (work(middle) < work_before) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    return first;
  }

 private:
  static constexpr int kDigit = 11;           // bits, at most
  static constexpr int64_t kShare = 1 << 12;  // indices that a thread takes at least
  static constexpr int64_t kFewKeys = 64;     // fewer are not worth counters
  // Keys that are sorted in the time that it takes to count with one more digit.
  static constexpr int64_t kKeysOfDigit = 1;

  // Room for values that are written before they are read.
  template <typename T>
  static std::unique_ptr<T[]> room(int64_t count) {
    return std::unique_ptr<T[]>(new T[count]);
  }

  // The keys of a thread, in two halves with counters of their own: a frequent digit's next key would wait for its
  // counter.
  template <typename Key>
  struct Share {
    Key *keys, *end;
    std::array<uint32_t, 2>* place;  // for each digit

    // Calls body(key, place[digit_of(key)]), by value, as what they hold stays in registers then.
    template <typename Digit, typename Body>
    NLPKERNELS_INLINE void for_each_key(Digit digit_of, Body body) {
      const int64_t count = end - keys, half = count / 2;
      const Key *const one = keys, *const other = keys + half;
      auto* const counters = place;
      for (int64_t i = 0; i < half; ++i) {
        body(one[i], counters[digit_of(one[i])][0]);
        body(other[i], counters[digit_of(other[i])][1]);
      }
      if (count % 2 == 1) body(other[half], counters[digit_of(other[half])][1]);
    }
  };

  template <typename Key>
  void sort(const Indices& indices, const Bags& bags, int64_t padding_idx, int64_t threads) {
    const int64_t total = bags.total();
    auto keys = room<Key>(total), buffer = room<Key>(total);
    if (wants_positions_) bag_of_ = room<uint32_t>(total);
    std::vector<Share<Key>> shares(std::clamp<int64_t>(total / kShare, 1, threads));
    const auto for_each_share = [&](const auto& body) {
      at::parallel_for(0, shares.size(), 1, [&](int64_t first, int64_t last) {
        for (const auto i : c10::irange(first, last)) body(i, shares[i]);
      });
    };
    const int64_t count = shares.size();
    const int shift = shift_;
    for_each_share([&](int64_t i, Share<Key>& share) {
      const int64_t first = bags.count() * i / count, last = bags.count() * (i + 1) / count;
      share.keys = keys.get() + (first < bags.count() ? bags.begin(first) : total);
      share.end = bag_of_ == nullptr ? add_keys<false>(indices, bags, first, last, padding_idx, share.keys)
                                     : add_keys<true>(indices, bags, first, last, padding_idx, share.keys);
    });
    int64_t uses = 0;
    for (const Share<Key>& share : shares) uses += share.end - share.keys;
    low_ = room<uint32_t>(uses);
    start_ = room<uint32_t>(uses + 1);
    rows_ = room<int64_t>(uses + 1);
    start_[0] = 0;

    if (uses < kFewKeys || row_bits_ == 0) {
      Key* end = buffer.get();
      for (const Share<Key>& share : shares) end = std::copy(share.keys, share.end, end);
      if (row_bits_ > 0) std::sort(buffer.get(), end);
      return add_sorted(buffer.get(), end);
    }
    // Counters for the digits 0 .. 2^kDigit, of each share.
    constexpr int64_t counters = (1 << kDigit) + 1;
    const auto places = room<std::array<uint32_t, 2>>(counters * count);
    for (const auto i : c10::irange(count)) shares[i].place = places.get() + i * counters;
    // Sorts the shares' keys by a digit, which is below `digits`, to the places that they have in buffer from `begin`
    // on, and makes that the keys. Returns where those of the last digit begin.
    const auto sort_by = [&](int64_t begin, Key digits, const auto& digit_of) {
      for_each_share([&](int64_t, Share<Key>& share) {
        std::fill_n(share.place, digits, std::array<uint32_t, 2>{});
        share.for_each_key(digit_of, [](Key, uint32_t& counter) { ++counter; });
      });
      uint32_t before = begin, begin_of_last = begin;
      for (Key digit = 0; digit < digits; ++digit) {
        begin_of_last = before;
        for (Share<Key>& share : shares) {
          for (uint32_t& counter : share.place[digit]) before += std::exchange(counter, before);
        }
      }
      for_each_share([&](int64_t, Share<Key>& share) {
        share.for_each_key(digit_of, [to = buffer.get()](Key key, uint32_t& next) { to[next++] = key; });
      });
      keys.swap(buffer);
      return begin_of_last;
    };
    const auto share_out = [&](int64_t begin) {
      for (const auto i : c10::irange(count)) {
        shares[i].keys = keys.get() + begin + (uses - begin) * i / count;
        shares[i].end = keys.get() + begin + (uses - begin) * (i + 1) / count;
      }
    };
    // Frequent rows first: 12,800 uses of two million words take 0.6 of the time.
    int64_t begin = 0;
    const int counted_bits = std::min(kDigit, bits(uses) - 2);
    static_assert(kFewKeys >= 8, "counted_bits is 1 at least");
    if (row_bits_ > counted_bits && most_are_below(shares, Key(1) << (counted_bits + shift))) {
      const Key rest = Key(1) << counted_bits;
      begin = sort_by(0, rest + 1, [shift, rest](Key key) { return std::min(key >> shift, rest); });
      share_out(begin);
      add_counted(keys.get(), begin, rest, [&](Key row) { return shares.back().place[row][1]; });
    }
    // The others digit by digit.
    if (begin < uses) {
      const int digit = digit_bits(uses - begin, count);
      const Key mask = (Key(1) << digit) - 1;
      for (int sorted = 0; sorted < row_bits_; sorted += digit) {
        sort_by(begin, mask + 1, [low = shift + sorted, mask](Key key) { return key >> low & mask; });
        share_out(begin);
      }
    }
    add_sorted(keys.get() + begin, keys.get() + uses);
  }

  // The keys of some bags' uses; returns their end.
  template <bool kPositions, typename Key>
  Key* add_keys(const Indices& given, const Bags& bags, int64_t first, int64_t last, int64_t padding_idx, Key* end) {
    const Indices indices = given;
    const int shift = shift_;
    uint32_t* const bag_of = bag_of_.get();
    for (int64_t bag = first; bag < last; ++bag) {
      const int64_t past = bags.end(bag);
      for (int64_t position = bags.begin(bag); position < past; ++position) {
        const int64_t row = indices[position];
        if (kPositions) bag_of[position] = bag;
        *end = static_cast<Key>(row) << shift | static_cast<Key>(kPositions ? position : bag);
        end += row != padding_idx;
      }
    }
    return end;
  }

  // The bits of the digits that rows of one bit and more are sorted by: wide ones take fewer passes over the keys, but
  // more counters.
  int digit_bits(int64_t keys, int64_t shares) const {
    int best = 0;
    int64_t least = 0;
    for (int digit = 1; digit <= std::min(kDigit, row_bits_); ++digit) {
      const int64_t passes = (row_bits_ + digit - 1) / digit;
      const int64_t cost = passes * (keys + kKeysOfDigit * (int64_t(1) << digit) * shares);
      if (best == 0 || cost < least) {
        best = digit;
        least = cost;
      }
    }
    return best;
  }

  // Whether most keys are less than `limit`, by a sample.
  template <typename Key>
  static bool most_are_below(const std::vector<Share<Key>>& shares, Key limit) {
    constexpr int64_t kSample = 64;
    int64_t below = 0;
    for (const Share<Key>& share : shares) {
      for (int64_t i = 0; i < kSample && share.keys < share.end; ++i) {
        below += share.keys[(share.end - share.keys) * i / kSample] < limit;
      }
    }
    return 2 * below > kSample * static_cast<int64_t>(shares.size());
  }

  // Adds the first uses, as sorted keys, of rows below `rows`, the uses of each of which end at end_of(row).
  template <typename Key, typename EndOf>
  void add_counted(const Key* keys, int64_t uses, int64_t rows, const EndOf& end_of) {
    const Key mask = (Key(1) << shift_) - 1;
    std::transform(keys, keys + uses, low_.get(), [mask](Key key) { return static_cast<uint32_t>(key & mask); });
    uint32_t *start = start_.get(), before = 0;
    int64_t *row_of = rows_.get(), count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const uint32_t end = end_of(row);
      row_of[count] = row;
      count += end != before;
      start[count] = before = end;
    }
    count_ = count;
  }

  // Adds the next uses, as sorted keys, of other rows than those before.
  template <typename Key>
  void add_sorted(const Key* keys, const Key* keys_end) {
    if (keys == keys_end) return;
    const int64_t before = start_[count_], uses = keys_end - keys;
    const int shift = shift_;
    const Key mask = (Key(1) << shift) - 1;
    uint32_t *low = low_.get() + before, *start = start_.get();
    int64_t *row = rows_.get(), last = count_;
    Key previous = keys[0] >> shift;
    for (int64_t i = 0; i < uses; ++i) {  // without a branch that nobody could predict
      const Key next = keys[i] >> shift;
      low[i] = static_cast<uint32_t>(keys[i] & mask);
      last += next != previous;
      row[last] = previous = next;
      start[last + 1] = before + i + 1;
    }
    count_ = last + 1;
  }

  const bool wants_positions_;
  const int row_bits_, shift_;
  int64_t count_ = 0;
  std::unique_ptr<uint32_t[]> low_, start_, bag_of_;
  std::unique_ptr<int64_t[]> rows_;
};

}  // namespace CPU_CAPABILITY
}  // namespace nlpkernels
