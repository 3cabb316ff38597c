// Bank conflicts of shared memory, counted for every access site of a kernel.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>

#include "fibers.h"

namespace simt {

struct Conflicts {  // of one access site: 1 cycle per phase is the best there is
  long phases = 0, cycles = 0;
};

// Bank conflicts by site. A warp's lanes come one by one: the n-th access of a lane at a site belongs to the warp's
// n-th.
class BankCounter {
 public:
  struct Launched {
    const void* kernel;
    int ways;  // most words of one bank that an access asked for: 1 = no conflict, 0 = no access
  };
  std::vector<Launched> launches;

  void clear() {
    sites_.clear();
    launches.clear();
  }
  void begin_launch(const void* kernel) { launches.push_back({kernel, 0}); }
  void reset_block() { open_.clear(); }

  // One phase: the cycles of those lanes' accesses are the most distinct words that fall into one bank.
  void phase(Site site, const uint32_t* addresses, int lanes, uint32_t bytes) {
    int most = 1, used[32] = {};
    uint32_t words[32 * 4];
    int count = 0;
    for (int lane = 0; lane < lanes; ++lane)
      for (uint32_t i = 0; i < bytes; i += 4) {
        const uint32_t word = (addresses[lane] + i) / 4;
        bool known = false;
        for (int k = 0; k < count; ++k) known |= words[k] == word;
        if (known) continue;
        words[count++] = word;
        const int ways = ++used[word % 32];
        most = ways > most ? ways : most;
      }
    Conflicts& conflicts = sites_[site.line * 64 + file_number(site.file)];
    ++conflicts.phases;
    conflicts.cycles += most;
    launches.back().ways = std::max(launches.back().ways, most);
  }

  void access(Site site, uint32_t address, uint32_t bytes) {
    const int warp = machine.current->thread / 32, lane = machine.lane();
    Open& open = open_[{warp, site.line * 64 + file_number(site.file)}];
    const size_t nth = open.seen[lane]++;
    if (open.rows.size() <= nth) open.rows.resize(nth + 1);
    Row& row = open.rows[nth];
    row.address[lane] = address;
    if (++row.count < 32) return;
    const int lanes = static_cast<int>(128 / bytes);
    for (int first = 0; first < 32; first += lanes) phase(site, row.address + first, lanes, bytes);
  }

  double worst() const {
    double factor = 1;
    for (const auto& [key, c] : sites_)
      factor = std::max(factor, static_cast<double>(c.cycles) / static_cast<double>(c.phases));
    return factor;
  }
  std::string table() const {
    std::string text;
    for (const auto& [key, c] : sites_) {
      char line[160];
      const char* path = files_[static_cast<size_t>(key % 64)];
      const char* slash = strrchr(path, '/');
      snprintf(line, sizeof line, "%s:%d %.3f\n", slash ? slash + 1 : path, key / 64,
               static_cast<double>(c.cycles) / static_cast<double>(c.phases));
      text += line;
    }
    return text;
  }

 private:
  struct Row {
    uint32_t address[32];
    int count = 0;
  };
  struct Open {
    size_t seen[32] = {};
    std::vector<Row> rows;
  };

  int file_number(const char* file) {
    for (size_t i = 0; i < files_.size(); ++i)
      if (files_[i] == file || !strcmp(files_[i], file)) return static_cast<int>(i);
    files_.push_back(file);
    return static_cast<int>(files_.size() - 1);
  }

  std::map<int, Conflicts> sites_;
  std::map<std::pair<int, int>, Open> open_;
  std::vector<const char*> files_;
};

inline BankCounter banks;

}  // namespace simt
