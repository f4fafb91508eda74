// SPDX-License-Identifier: Apache-2.0
// Virtual calls over 1 to 8 classes, the objects sorted by class or shuffled, on one or
// more threads. Usage: virtual CLASSES sorted|shuffled THREADS. Speaks the drivers'
// protocol: "ready", then "NANOSECONDS RESULT" (CPU time of all threads) for each line.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Shape {
  explicit Shape(uint64_t size) : size_(size) {}
  virtual ~Shape() = default;
  virtual uint64_t area(uint64_t seed) const = 0;

 protected:
  uint64_t size_;
};

// One class for each kind; small bodies, as accessors and visitors have.
template <unsigned Kind>
struct ShapeOf final : Shape {
  using Shape::Shape;
  uint64_t area(uint64_t seed) const override { return size_ * (2 * Kind + 1) + (seed >> Kind); }
};

std::unique_ptr<Shape> make_shape(unsigned kind, uint64_t size) {
  switch (kind) {
    case 0: return std::make_unique<ShapeOf<0>>(size);
    case 1: return std::make_unique<ShapeOf<1>>(size);
    case 2: return std::make_unique<ShapeOf<2>>(size);
    case 3: return std::make_unique<ShapeOf<3>>(size);
    case 4: return std::make_unique<ShapeOf<4>>(size);
    case 5: return std::make_unique<ShapeOf<5>>(size);
    case 6: return std::make_unique<ShapeOf<6>>(size);
    default: return std::make_unique<ShapeOf<7>>(size);
  }
}

using Shapes = std::vector<std::unique_ptr<Shape>>;

uint64_t visit(const Shapes& shapes, int passes) {
  uint64_t sum = 0;
  for (int pass = 0; pass < passes; pass++)
    for (const auto& shape : shapes) sum += shape->area(sum & 0xff);
  return sum;
}

int64_t cpu_ns() {
  timespec now{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return fprintf(stderr, "usage: %s CLASSES sorted|shuffled THREADS\n", argv[0]), 2;
  const unsigned classes = unsigned(atoi(argv[1]));
  const bool shuffled = std::string(argv[2]) == "shuffled";
  const int threads = atoi(argv[3]);
  constexpr int n_shapes = 16384;
  constexpr int calls = 8'000'000;

  std::vector<unsigned> kinds;
  for (int i = 0; i < n_shapes; i++) kinds.push_back(unsigned(i) * classes / n_shapes);
  std::mt19937_64 random(1);
  if (shuffled) std::shuffle(kinds.begin(), kinds.end(), random);
  Shapes shapes;
  for (unsigned i = 0; i < n_shapes; i++) shapes.push_back(make_shape(kinds[i], i & 63));

  puts("ready");
  fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    std::vector<uint64_t> sums(size_t(threads), 0);
    const int64_t begin = cpu_ns();
    std::vector<std::thread> others;
    const int passes = calls / n_shapes / threads;
    for (int i = 1; i < threads; i++)
      others.emplace_back([&, i] { sums[size_t(i)] = visit(shapes, passes); });
    sums[0] = visit(shapes, passes);
    for (auto& other : others) other.join();
    const int64_t elapsed = cpu_ns() - begin;
    uint64_t sum = 0;
    for (uint64_t one : sums) sum += one;
    printf("%lld %llu\n", (long long)elapsed, (unsigned long long)sum);
    fflush(stdout);
  }
}
